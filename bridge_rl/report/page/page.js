"use strict";
// The viewer of groups. Its place is in the address: #condition/width/problem/group, so that a group can be linked to.
(() => {
  const holder = document.getElementById("data");
  if (holder === null) return;
  const data = JSON.parse(holder.textContent);
  const byId = (id) => document.getElementById(id);
  const STEP_HEIGHT = 20; // as .step in the style sheet
  const SPARE = 20; // steps drawn beyond what is seen, above and below
  const keyOf = (group) => `${group.condition}/${group.width}/${group.problem}/${group.group}`;
  const byKey = new Map(data.groups.map((group) => [keyOf(group), group]));
  const starts = data.groups.filter((group) => group.width === data.startWidth);
  let current = byKey.get(location.hash.slice(1)) || starts.find((group) => group.mixed) || starts[0];
  let asText = false;

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // -- which group ---------------------------------------------------------------------------------------------------

  const offered = () => data.groups.filter((group) => !byId("only-mixed").checked || group.mixed);
  const CHOICES = ["condition", "width", "problem", "group"];

  function fill(select, values, chosen, label) {
    select.replaceChildren(...values.map((value) => {
      const option = make("option", "", label(value));
      option.value = String(value);
      option.selected = value === chosen;
      return option;
    }));
  }

  function fillChoices() {
    let left = offered();
    for (const part of CHOICES) {
      const values = [...new Set(left.map((group) => group[part]))];
      fill(byId(`choose-${part}`), values, current[part], (value) => part === "condition" ? data.conditions[value] : value);
      left = left.filter((group) => group[part] === current[part]);
    }
  }

  // The group at a choice: what stands right of the changed choice is kept where there is such a group.
  function chosenGroup(changed) {
    let left = offered();
    CHOICES.forEach((part, place) => {
      const wanted = place <= CHOICES.indexOf(changed) ? byId(`choose-${part}`).value : String(current[part]);
      const fitting = left.filter((group) => String(group[part]) === wanted);
      if (fitting.length > 0) left = fitting;
    });
    return left[0];
  }

  function move(distance) {
    const groups = offered();
    const at = groups.indexOf(current);
    const next = groups[Math.min(groups.length - 1, Math.max(0, at + distance))];
    if (next !== undefined && next !== current) show(next, true);
  }

  function show(group, remember) {
    current = group;
    if (remember) history.replaceState(null, "", `#${keyOf(group)}`);
    fillChoices();
    const groups = offered();
    byId("place").textContent = `${groups.indexOf(group) + 1} / ${groups.length}`;
    const problem = data.problems[group.problem];
    byId("problem-text").textContent = problem.text;
    byId("problem-answer").textContent = problem.answer;
    byId("problem-prompt").textContent = problem.prompt;
    drawHeads();
    byId("viewer").scrollTop = 0;
    drawBody();
  }

  // -- its rows ------------------------------------------------------------------------------------------------------

  const ENDS = { stop: "EOS", length: "cut at the limit", abort: "given up" };

  function drawHeads() {
    const heads = current.rows.map((row, number) => {
      const head = make("div", row.correct ? "head right" : "head");
      head.append(make("b", "", `row ${number + 1} ${row.correct ? "✓ right" : "✗ wrong"}`), make("br"));
      head.append(row.answer === null ? "no answer" : `answer ${row.answer}`, make("br"));
      const verdict = row.verdict === "ok" ? "" : ` · ${row.verdict}`;
      head.append(make("span", "end", `${row.tokens.length} tokens, ${ENDS[row.finish] || row.finish}${verdict}`));
      head.title = `log-prob ${row.logprob.toFixed(2)}`;
      return head;
    });
    byId("heads").replaceChildren(make("div", "corner", "step"), ...heads);
  }

  // One line in a cell: a space that leads or stands alone is a dot, line breaks and tabs are shown as signs.
  function cell(row, step) {
    if (step > row.tokens.length || (step === row.tokens.length && row.finish === "stop")) return make("div", "token after");
    if (step === row.tokens.length) return make("div", "token end cut", `✂ ${ENDS[row.finish] || row.finish}`);
    const piece = data.pieces[row.tokens[step]];
    const last = step === row.tokens.length - 1 && row.finish === "stop";
    const element = make("div", last ? "token end" : "token");
    element.title = JSON.stringify(piece);
    for (const part of piece.split(/(^ +|[\n\t\r]| +$)/)) {
      const sign = part.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(" ", "·");
      if (/^[ \n\t\r]+$/.test(part)) element.append(make("span", "blank", sign));
      else if (part) element.append(part);
    }
    if (last) element.append(" ■");
    return element;
  }

  function drawSteps() {
    const viewer = byId("viewer");
    const total = Math.max(...current.rows.map((row) => row.tokens.length + (row.finish === "stop" ? 0 : 1)));
    byId("steps").style.height = `${total * STEP_HEIGHT}px`; // first: the viewer's own height follows it
    const first = Math.max(0, Math.floor(viewer.scrollTop / STEP_HEIGHT) - SPARE);
    const end = Math.min(total, Math.ceil((viewer.scrollTop + viewer.clientHeight) / STEP_HEIGHT) + SPARE);
    const lines = [];
    for (let step = first; step < end; step++) {
      const line = make("div", "step");
      line.style.top = `${step * STEP_HEIGHT}px`;
      line.append(make("div", "at", step + 1), ...current.rows.map((row) => cell(row, step)));
      lines.push(line);
    }
    byId("steps").replaceChildren(...lines);
  }

  function drawBody() {
    byId("as-text").setAttribute("aria-pressed", asText);
    byId("as-steps").setAttribute("aria-pressed", !asText);
    byId("viewer").style.setProperty("--column", asText ? "240px" : "124px");
    if (!asText) return drawSteps();
    const texts = make("div", "texts");
    const whole = (row) => make("div", "whole", row.text);
    texts.append(make("div", "corner"), ...current.rows.map(whole));
    byId("steps").style.height = "";
    byId("steps").replaceChildren(texts);
  }

  // -- what the reader does ------------------------------------------------------------------------------------------

  for (const part of CHOICES) byId(`choose-${part}`).addEventListener("change", () => show(chosenGroup(part), true));
  byId("only-mixed").addEventListener("change", () => {
    const groups = offered();
    if (groups.length === 0) byId("only-mixed").checked = false; // no mixed group at all: nothing to filter
    show(groups.includes(current) ? current : groups[0] || current, true);
  });
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("as-steps").addEventListener("click", () => { asText = false; drawBody(); });
  byId("as-text").addEventListener("click", () => { asText = true; drawBody(); });
  let waiting = false;
  byId("viewer").addEventListener("scroll", () => {
    if (asText || waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawSteps(); });
  });
  window.addEventListener("resize", () => { if (!asText) drawSteps(); });
  window.addEventListener("hashchange", () => {
    const group = byKey.get(location.hash.slice(1));
    if (group === undefined) return;
    if (!offered().includes(group)) byId("only-mixed").checked = false;
    show(group, false);
    byId("groups").scrollIntoView();
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest("select, input, textarea")) return;
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    move(event.key === "ArrowLeft" ? -1 : 1);
  });
  show(current, false);
  if (byKey.has(location.hash.slice(1))) byId("groups").scrollIntoView();
})();
