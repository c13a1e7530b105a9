// The pictures of an answer, in the index's order and reranked, with the moves between the two.

import { showThumbnail } from "./api.js";

const results = document.querySelector("#results");
const sections = { before: document.querySelector("#before"), after: document.querySelector("#after") };

/** Show an answer. `open` is called with a result when its card is chosen. */
export function showResults(answer, view, needsKey, open) {
  const isShown = { before: view !== "after", after: view !== "before" };
  const lists = { before: answer.first_stage, after: answer.results };
  for (const [name, section] of Object.entries(sections)) {
    section.hidden = !isShown[name];
    section.querySelector("ol").replaceChildren(
      ...lists[name].map((result) => card(result, name === "after", answer, needsKey, open)));
  }
  results.classList.toggle("single", view !== "both");
  results.hidden = false;
}

export function hideResults() {
  results.hidden = true;
}

/** The name of an image for people. */
export function nameOf(result) {
  return result.metadata.name ?? result.image_id;
}

function card(result, isAfter, answer, needsKey, open) {
  const button = element("button", "card");
  button.type = "button";
  button.dataset.id = result.image_id;
  button.classList.toggle("missing", result.is_missing);
  const img = element("img");
  img.alt = "";
  img.loading = "lazy";
  img.addEventListener("error", () => img.removeAttribute("src"));
  showThumbnail(img, result.image_id, needsKey);
  const caption = element("span", "caption");
  caption.append(element("span", "rank", String(isAfter ? result.rank : result.rank_before)));
  if (isAfter && !answer.degraded) {
    caption.append(move(result));
    caption.append(element("span", "score", result.is_missing ? "no tokens" : result.relevance_score.toFixed(3)));
  }
  if (!isAfter) caption.append(element("span", "score", result.first_stage_score.toFixed(3)));
  caption.append(element("span", "name", nameOf(result)));
  button.append(img, caption);
  button.addEventListener("click", () => open(result));
  const item = element("li");
  item.append(button);
  return item;
}

function move(result) {
  const by = result.rank_before - result.rank;
  if (by === 0) return element("span", "same", "=");
  const span = element("span", by > 0 ? "up" : "down", `${by > 0 ? "▲" : "▼"}${Math.abs(by)}`);
  span.title = `${by > 0 ? "up" : "down"} from ${result.rank_before}`;
  return span;
}

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
