// The page: its state is the address, so that a link shows the same and the browser's buttons work.

import { post, request } from "./api.js";
import { closeDetail, openDetail } from "./detail.js";
import { hideTimings, showTimings } from "./latency.js";
import { hideResults, showResults } from "./results.js";
import { acceptUploads } from "./upload.js";

const options = JSON.parse(document.body.dataset.options);
const form = document.querySelector("#search");
const status = document.querySelector("#status");
const notice = document.querySelector("#notice");
const DEFAULTS = { k: "50", n: "12", view: "both" };

let answer = null;
let shownFor = null; // the query and candidates that `answer` is for
let searching = null;

/** The state of the page, as the address has it. */
function stateOf(address) {
  const given = new URL(address).searchParams;
  const state = { q: given.get("q") ?? "", open: given.get("open"), word: null };
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const value = given.get(name);
    const offered = [...form.elements[name].options].map((option) => option.value);
    state[name] = offered.includes(value) ? value : usual;
  }
  if (/^\d{1,3}$/.test(given.get("word") ?? "")) state.word = Number(given.get("word"));
  return state;
}

function addressOf(state) {
  const query = new URLSearchParams();
  if (state.q) query.set("q", state.q);
  for (const [name, usual] of Object.entries(DEFAULTS)) if (state[name] !== usual) query.set(name, state[name]);
  if (state.open) query.set("open", state.open);
  if (state.open && state.word !== null) query.set("word", String(state.word));
  return query.size ? `/?${query}` : "/";
}

let state = stateOf(location.href);

/** Change the state; a new entry of the history unless `replace`. */
function go(changes, { replace = false } = {}) {
  const next = { ...state, ...changes };
  if (addressOf(next) === addressOf(state)) return;
  state = next;
  history[replace ? "replaceState" : "pushState"](null, "", addressOf(state));
}

/** Show what the state says; asks the gateway only if the question is another one. */
async function show() {
  form.elements.q.value = state.q;
  for (const name of Object.keys(DEFAULTS)) form.elements[name].value = state[name];
  document.title = state.q ? `${state.q} – Picture search` : "Picture search";
  const question = JSON.stringify([state.q, state.k, state.n]);
  if (!state.q) {
    searching?.abort();
    answer = shownFor = null;
    hideResults();
    hideTimings();
    notice.hidden = true;
    status.textContent = "";
  } else if (question !== shownFor) {
    if (!(await search())) return;
    shownFor = question;
  }
  if (answer) showResults(answer, state.view, options.needs_key, (result) => {
    go({ open: result.image_id, word: null });
    showDetail();
  });
  showDetail();
}

/** Ask the gateway; returns whether there is an answer to show. */
async function search() {
  searching?.abort();
  searching = new AbortController();
  const { signal } = searching;
  status.textContent = "Searching…";
  notice.hidden = true;
  const began = performance.now();
  try {
    const top_n = Number(state.n);
    const body = { query: state.q, top_n, candidates: Math.max(top_n, Math.min(Number(state.k), options.max_candidates)) };
    answer = await post("/v1/search", body, signal);
  } catch (error) {
    if (error.name === "AbortError") return false;
    answer = shownFor = null;
    hideResults();
    hideTimings();
    status.textContent = "";
    tell(`No answer: ${error.message}.`);
    return false;
  }
  showTimings(answer, performance.now() - began, options.trace_url);
  status.textContent = answer.num_candidates
    ? `${answer.results.length} of ${answer.num_candidates} candidates`
    : "Nothing found: there are no pictures yet.";
  const warnings = answer.warnings.map(({ message }) => message);
  if (answer.degraded) warnings.unshift(`Not reranked: ${answer.degraded_message}. This is the first stage's order.`);
  if (warnings.length) tell(warnings.join(" "));
  return true;
}

function tell(text) {
  notice.textContent = text;
  notice.hidden = false;
}

function showDetail() {
  const result = answer && [...answer.results, ...answer.first_stage].find((each) => each.image_id === state.open);
  if (!result) {
    closeDetail();
    return;
  }
  const opened = state.open;
  openDetail(result, answer, options, {
    word: state.word,
    changed: (word) => go({ word }, { replace: true }),
    closed: () => {
      if (state.open === opened) go({ open: null, word: null });
      document.querySelector(`.card[data-id="${CSS.escape(opened)}"]`)?.focus();
    },
  });
}

async function tellAbout() {
  try {
    const info = await (await request("/v1/info")).json();
    const parts = [];
    if (info.num_images !== undefined) parts.push(`${info.num_images.toLocaleString("en")} pictures`);
    if (info.model) parts.push(`model ${info.model}`);
    document.querySelector("#about").textContent = parts.join(" · ");
    if (info.problem) tell(`${info.problem}.`);
  } catch (error) {
    tell(`${error.message}.`);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const given = new FormData(form);
  shownFor = null; // the same question again is asked again
  go({ q: given.get("q").trim(), k: given.get("k"), n: given.get("n"), view: given.get("view"), open: null, word: null });
  show();
});
for (const name of Object.keys(DEFAULTS)) {
  form.elements[name].addEventListener("change", () => {
    go({ [name]: form.elements[name].value, open: null, word: null });
    show();
  });
}
document.querySelector("#examples")?.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go({ q: new URL(link.href).searchParams.get("q"), open: null, word: null });
  show();
});
addEventListener("popstate", () => {
  state = stateOf(location.href);
  show();
});

tellAbout();
acceptUploads(options);
show();
