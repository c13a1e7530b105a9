// Requests to the gateway. An API key, where one is needed, is kept for the tab and asked for once.

const KEY = "edje-api-key";
const keyDialog = document.querySelector("#key-dialog");

export class GatewayError extends Error {
  constructor(status, body) {
    super(body.message ?? `the gateway answered with ${status}`);
    this.status = status;
    this.code = body.code;
  }
}

/** Make a request; returns the response. Throws `GatewayError`, or an `AbortError` if the signal aborts it. */
export async function request(path, options = {}) {
  const send = () => {
    const headers = new Headers(options.headers);
    const key = sessionStorage.getItem(KEY);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    return fetch(path, { ...options, headers });
  };
  let response;
  try {
    response = await send();
    if (response.status === 401 && (await askForKey())) response = await send();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GatewayError(0, { message: "the gateway does not answer; is it running?" });
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new GatewayError(response.status, body);
  }
  return response;
}

/** Post JSON; returns the JSON answer. */
export async function post(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  return (await request(path, options)).json();
}

export function imagePath(id) {
  return `/v1/images/${encodeURIComponent(id)}`;
}

/** Show an image's thumbnail in an <img>; with a key it has to be fetched, because an <img> sends none. */
export async function showThumbnail(img, id, needsKey) {
  const path = `${imagePath(id)}/thumbnail`;
  if (!needsKey) {
    img.src = path;
    return;
  }
  try {
    const url = URL.createObjectURL(await (await request(path)).blob());
    img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    img.src = url;
  } catch {
    img.dispatchEvent(new Event("error"));
  }
}

let asking = null;

/** Ask for a key; several requests that were refused at once share one question. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const form = document.querySelector("#key-form");
    const done = (given) => {
      asking = null;
      resolve(given);
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, document.querySelector("#key").value.trim());
      form.reset();
      keyDialog.close("given");
    }, { once: true });
    keyDialog.addEventListener("close", () => done(keyDialog.returnValue === "given"), { once: true });
    keyDialog.returnValue = "";
    keyDialog.showModal();
  });
  return asking;
}
