// Where the time of a search went: one bar of stages, and the link to the request's trace.

import { element } from "./results.js";

const section = document.querySelector("#timings");
const NUM_COLOURS = 6;
const OTHER_COLOUR = 7;
/** Stages in the order of their work, with their names for people. */
const STAGES = {
  embed: "query to vector", search_index: "index", inbox: "inbox", queue: "queue", fetch: "tokens",
  batch_wait: "batch", score: "scoring",
};

/** Show the stages of an answer; `totalMs` is the time that the browser waited. */
export function showTimings(answer, totalMs, traceUrl) {
  const stages = Object.entries(STAGES)
    .filter(([stage]) => (answer.timings_ms[stage] ?? 0) > 0)
    .map(([stage, label]) => [label, answer.timings_ms[stage]]);
  const measured = stages.reduce((sum, [, ms]) => sum + ms, 0);
  const rest = Math.max(0, totalMs - measured);
  const parts = [...stages, ["Kafka, HTTP and browser", rest]];
  const whole = Math.max(totalMs, measured, 0.001);
  const bar = [], legend = [element("span", "", `${totalMs.toFixed(0)} ms in all:`)];
  parts.forEach(([label, ms], index) => {
    const colour = index === parts.length - 1 ? OTHER_COLOUR : (index % NUM_COLOURS) + 1;
    const piece = element("span", `stage-${colour}`);
    piece.style.width = `${(100 * ms) / whole}%`;
    piece.title = `${label}: ${ms.toFixed(1)} ms`;
    bar.push(piece);
    const entry = element("span");
    entry.append(element("i", `stage-${colour}`), `${label} ${ms.toFixed(1)}`);
    legend.push(entry);
  });
  section.querySelector("#bar").replaceChildren(...bar);
  section.querySelector("#legend").replaceChildren(...legend);
  const link = section.querySelector("#trace");
  link.hidden = !traceUrl;
  link.href = traceUrl
    .replaceAll("{trace_id}", encodeURIComponent(answer.trace_id ?? ""))
    .replaceAll("{request_id}", encodeURIComponent(answer.id));
  section.hidden = false;
}

export function hideTimings() {
  section.hidden = true;
}
