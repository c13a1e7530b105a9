// One picture, large: its ranks, its metadata, and which word of the query finds which part of it.

import { post, showThumbnail } from "./api.js";
import { element, nameOf } from "./results.js";

const dialog = document.querySelector("#detail");
const img = dialog.querySelector(".picture img");
const map = dialog.querySelector("#map");
const words = dialog.querySelector("#words");
const note = dialog.querySelector("#detail-note");
let loading = null;

/**
 * Open a result. `changed(word)` is called when a word is chosen (its number) or the map is taken away (null);
 * `closed()` when the dialog is closed.
 */
export function openDetail(result, answer, options, { word, changed, closed }) {
  dialog.querySelector("h2").textContent = nameOf(result);
  img.alt = nameOf(result);
  showThumbnail(img, result.image_id, options.needs_key);
  dialog.querySelector("#detail-rank").textContent = rankSentence(result, answer);
  const rows = Object.entries({ "image id": result.image_id, ...result.metadata });
  dialog.querySelector("#metadata").replaceChildren(
    ...rows.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
  words.hidden = map.hidden = true;
  note.textContent = "";
  dialog.onclose = () => {
    loading?.abort();
    closed();
  };
  if (!dialog.open) dialog.showModal();
  explain(result, answer, options, word, changed);
}

export function closeDetail() {
  if (dialog.open) dialog.close();
}

function rankSentence(result, answer) {
  const before = `Number ${result.rank_before} of ${answer.num_candidates} by the first stage`;
  if (answer.degraded) return `${before}; not reranked.`;
  if (result.is_missing) return `${before}; not ranked, because its tokens are not in the store.`;
  return `${before}, number ${result.rank} after reranking, with a relevance of ${result.relevance_score.toFixed(3)}.`;
}

async function explain(result, answer, options, word, changed) {
  if (!options.explains || answer.degraded || result.is_missing) return;
  loading?.abort();
  loading = new AbortController();
  try {
    const body = { query: answer.query, documents: [{ image_id: result.image_id }], explain: true, on_failure: "error" };
    const explained = await post("/v2/rerank", body, loading.signal);
    const explanation = explained.results[0]?.explanation;
    if (!explanation?.length) return;
    if (options.token_grid) showWords(explanation, options.token_grid, word, changed);
    else note.textContent = bestWords(explanation);
  } catch (error) {
    if (error.name !== "AbortError") note.textContent = `No map of the words: ${error.message}.`;
  }
}

/** A sentence for models whose visual tokens have no place in the picture. */
function bestWords(explanation) {
  const best = explanation
    .map(({ word, similarities }) => [word, Math.max(...similarities)])
    .sort((a, b) => b[1] - a[1]);
  return `Words by how well the picture matches them: ${best.map(([word, by]) => `${word} ${by.toFixed(2)}`).join(", ")}.`;
}

function showWords(explanation, [rows, columns], chosen, changed) {
  const group = words.querySelector("[role=group]");
  const buttons = explanation.map(({ word }, index) => {
    const button = element("button", "", word);
    button.type = "button";
    button.addEventListener("click", () => choose(button.getAttribute("aria-pressed") === "true" ? null : index));
    return button;
  });
  const choose = (index) => {
    buttons.forEach((button, number) => button.setAttribute("aria-pressed", String(number === index)));
    map.hidden = index === null;
    if (index !== null) drawMap(explanation[index].similarities, rows, columns);
    changed(index);
  };
  group.replaceChildren(...buttons);
  words.hidden = false;
  choose(chosen !== null && chosen < buttons.length ? chosen : null);
}

/** One cell for each visual token, the more opaque the more similar to the word. */
function drawMap(similarities, rows, columns) {
  const low = Math.min(...similarities);
  const range = Math.max(...similarities) - low || 1;
  map.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  map.replaceChildren(...similarities.slice(0, rows * columns).map((similarity) => {
    const cell = element("span");
    cell.style.background = `rgb(230 70 0 / ${(0.7 * (similarity - low)) / range})`;
    cell.title = similarity.toFixed(3);
    return cell;
  }));
}
