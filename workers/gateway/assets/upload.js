// Uploads: pictures are made small here, sent, and watched until they can be found.

import { imagePath, request } from "./api.js";
import { element } from "./results.js";

const list = document.querySelector("#upload-list");
/** The longest side after making a picture small; models see a few hundred pixels. */
const MAX_SIDE = 1024;
const QUALITY = 0.9;
const POLL_MS = 700;
const GIVE_UP_MS = 120_000;
const NUM_AT_ONCE = 3;

/** Take files from the file input and from anywhere on the page. */
export function acceptUploads(options) {
  const input = document.querySelector("#files");
  input.addEventListener("change", () => {
    uploadAll([...input.files], options);
    input.value = "";
  });
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    document.querySelector("#uploads").open = true;
    uploadAll([...(event.dataTransfer?.files ?? [])], options);
  });
}

async function uploadAll(files, options) {
  const waiting = files.map((file) => [file, row(file.name)]);
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) await upload(...next, options);
  };
  await Promise.all(Array.from({ length: NUM_AT_ONCE }, work));
}

async function upload(file, { bar, state }, options) {
  const report = (value, text) => {
    if (value === null) bar.removeAttribute("value");
    else bar.value = value;
    state.textContent = text;
  };
  try {
    report(0.1, "making it small");
    const small = await madeSmall(file);
    if (small.size > options.max_image_bytes) throw new Error(`${small.size} bytes are too many, even made small`);
    report(0.3, "sending");
    const form = new FormData();
    form.append("file", small, file.name);
    const answer = await (await request("/v1/images", { method: "POST", body: form })).json();
    report(0.6, "being encoded and indexed");
    await untilIndexed(answer.images[0].image_id);
    report(1, "can be found");
  } catch (error) {
    report(0, `failed: ${error.message}`);
  }
}

/** A copy with at most `MAX_SIDE` pixels on a side, or the file itself if the browser cannot read it. */
async function madeSmall(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return file; // whether it is a picture is for the ingest worker to say
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
  return scale === 1 && file.size <= blob.size ? file : blob;
}

async function untilIndexed(id) {
  const giveUpAt = Date.now() + GIVE_UP_MS;
  while (Date.now() < giveUpAt) {
    let image = null;
    try {
      image = await (await request(imagePath(id))).json();
    } catch (error) {
      if (error.status !== 404 && error.status < 500) throw error; // 404: another replica has published it
    }
    if (image?.status === "indexed") return;
    if (image?.status === "failed") throw new Error(image.message ?? image.error);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  throw new Error("it was not indexed in time; are the ingest and the index worker running?");
}

function row(name) {
  const item = element("li");
  const bar = element("progress");
  bar.setAttribute("aria-label", `upload of ${name}`);
  bar.value = 0;
  const state = element("span", "", "waiting");
  item.append(element("span", "", name), bar, state);
  list.append(item);
  return { bar, state };
}
