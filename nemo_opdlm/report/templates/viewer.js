"use strict";
// Shows a response as it was after any of the forwards that wrote it. Its state is the page's fragment:
// #recording=0&response=0&step=3
(() => {
  const recordings = JSON.parse(document.getElementById("recordings").textContent);
  const viewer = document.getElementById("player");
  const find = (name) => viewer.querySelector(`[data-part="${name}"]`);
  const slider = find("step");
  const play = find("play");
  const state = { recording: 0, response: 0, step: 0 };
  let tokens = [];
  let rows = [];
  let timer = null;
  let fragmentTimer = null;

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  // Spaces and line breaks of a token are to be seen.
  const shown = (piece) =>
    piece === "" ? "∅" : piece.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\r", "␍").replaceAll("\t", "⇥");
  const percent = (share) => (share === null ? "unknown" : `${Math.round(100 * share)} %`);
  const level = (share) => (share === null ? "unknown" : `level-${Math.min(4, Math.floor(5 * share))}`);
  const response = () => recordings[state.recording].responses[state.response];
  const within = (value, high) => (Number.isInteger(value) ? Math.min(high, Math.max(0, value)) : high);
  const teacher = (its, i) =>
    its.agrees[i] ? "the teacher's first choice" : `the teacher's first choice is “${shown(its.first_choices[i])}”`;

  function fillSelect(name, labels) {
    find(name).replaceChildren(
      ...labels.map((label, i) => {
        const option = element("option", "", label);
        option.value = i;
        return option;
      }),
    );
  }

  function buildTokens() {
    const its = response();
    const blocks = new Map();
    tokens = its.pieces.map((piece, i) => {
      const token = element("li", "token");
      const content = element("span", "piece", shown(piece));
      const note = element("span", "note");
      const said = element("span", "said");
      token.append(content, note, said);
      if (!blocks.has(its.blocks[i])) blocks.set(its.blocks[i], []);
      blocks.get(its.blocks[i]).push(token);
      return { token, note, said };
    });
    find("tokens").replaceChildren(
      ...[...blocks].map(([number, members]) => {
        const block = element("li", "block");
        const list = element("ul");
        block.dataset.block = number;
        list.setAttribute("aria-label", `Block ${number}`);
        list.append(...members);
        block.append(list);
        return block;
      }),
    );
  }

  function buildTable() {
    const its = response();
    rows = its.pieces.map((piece, i) => {
      const row = element("tr");
      const logProb = its.log_probs[i] === null ? "unknown" : its.log_probs[i].toFixed(2);
      const choice = its.agrees[i] ? "the same" : shown(its.first_choices[i]);
      const cells = [i + 1, shown(piece), its.blocks[i], its.steps[i], percent(its.confidences[i]), choice, logProb];
      row.append(...cells.map((cell) => element("td", "", String(cell))));
      return row;
    });
    find("rows").replaceChildren(...rows);
  }

  function select(recording, number, step) {
    const changed = recording !== state.recording || tokens.length === 0;
    state.recording = within(recording, recordings.length - 1);
    const responses = recordings[state.recording].responses;
    if (changed) {
      const starts = responses.map((its, i) => `${i + 1}: ${its.prompt.replace(/\s+/g, " ").trim().slice(0, 60)}`);
      fillSelect("response", starts);
    }
    state.response = within(number, responses.length - 1);
    slider.max = response().num_forwards;
    find("recording").value = state.recording;
    find("response").value = state.response;
    find("prompt").textContent = response().prompt;
    buildTokens();
    buildTable();
    show(step);
  }

  function show(step) {
    const its = response();
    state.step = within(step, its.num_forwards);
    const active = new Set(its.blocks.filter((_, i) => its.steps[i] === state.step));
    let revealed = 0;
    let agreed = 0;
    tokens.forEach(({ token, note, said }, i) => {
      const isRevealed = its.steps[i] <= state.step;
      revealed += isRevealed;
      agreed += isRevealed && its.agrees[i];
      token.className = isRevealed ? `token ${level(its.confidences[i])}` : "token masked";
      token.classList.toggle("differs", isRevealed && !its.agrees[i]);
      token.classList.toggle("new", its.steps[i] === state.step);
      note.textContent = isRevealed ? percent(its.confidences[i]) : "mask";
      said.textContent = isRevealed ? `, revealed by forward ${its.steps[i]}, ${teacher(its, i)}` : "masked";
      rows[i].hidden = !isRevealed;
    });
    for (const block of find("tokens").children) {
      block.classList.toggle("active", active.has(Number(block.dataset.block)));
    }
    slider.value = state.step;
    slider.setAttribute("aria-valuetext", `forward ${state.step} of ${its.num_forwards}`);
    find("count").textContent = `${state.step} of ${its.num_forwards}`;
    find("told").textContent = told(its);
    find("sum").textContent =
      `${revealed} of ${tokens.length} tokens are revealed; ${agreed} of these are the teacher's first choice.`;
    find("text").textContent = its.pieces.map((piece, i) => (its.steps[i] <= state.step ? piece : "░")).join("");
    // Not `disabled`, which would take the focus from a button that has just been pressed.
    for (const name of ["start", "back"]) find(name).setAttribute("aria-disabled", state.step === 0);
    find("next").setAttribute("aria-disabled", state.step === its.num_forwards);
    Object.assign(viewer.dataset, { ...state, revealed, agreed });
  }

  function told(its) {
    if (state.step === 0) return "Before the first forward: every token is masked.";
    const members = its.pieces.map((_, i) => i).filter((i) => its.steps[i] === state.step);
    if (members.length === 0) return `Forward ${state.step} reveals tokens behind the response's end only.`;
    const parts = members.map(
      (i) => `“${shown(its.pieces[i])}” (confidence ${percent(its.confidences[i])}, ${teacher(its, i)})`,
    );
    return `Forward ${state.step} reveals, in block ${its.blocks[members[0]]}: ${parts.join(", ")}.`;
  }

  function go(step) {
    stop();
    show(step);
    writeFragment();
  }

  function choose(recording, number) {
    stop();
    select(recording, number, Infinity);
    writeFragment();
  }

  function start() {
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    const last = response().num_forwards;
    if (state.step === last) show(0);
    find("told").setAttribute("aria-live", "off"); // a screen reader could not keep up
    play.textContent = "Pause";
    timer = window.setInterval(
      () => {
        show(state.step + 1);
        if (state.step === last) go(last);
      },
      still ? 1500 : Math.max(80, Math.min(500, 20000 / last)),
    );
  }

  function stop() {
    window.clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    find("told").setAttribute("aria-live", "polite");
  }

  // Browsers refuse to change it many times in a second.
  function writeFragment() {
    window.clearTimeout(fragmentTimer);
    const { recording, response, step } = state;
    fragmentTimer = window.setTimeout(
      () => history.replaceState(null, "", `#recording=${recording}&response=${response}&step=${step}`),
      300,
    );
  }

  function readFragment() {
    const parts = new URLSearchParams(window.location.hash.slice(1));
    const number = (name, absent) => (parts.has(name) ? Number.parseInt(parts.get(name), 10) : absent);
    if (["recording", "response", "step"].some((name) => parts.has(name)) || tokens.length === 0) {
      select(number("recording", 0), number("response", 0), number("step", Infinity));
    }
  }

  find("recording").addEventListener("change", (event) => choose(Number(event.target.value), 0));
  find("response").addEventListener("change", (event) => choose(state.recording, Number(event.target.value)));
  slider.addEventListener("input", () => go(Number(slider.value)));
  find("start").addEventListener("click", () => go(0));
  find("back").addEventListener("click", () => go(state.step - 1));
  find("next").addEventListener("click", () => go(state.step + 1));
  play.addEventListener("click", () => (timer === null ? start() : go(state.step)));
  viewer.addEventListener("keydown", (event) => {
    const keys = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: response().num_forwards };
    // Slider and selects have keys of their own, and a table scrolls.
    if (!(event.key in keys) || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target.closest("input, select, .scrolls")) return;
    event.preventDefault();
    go(keys[event.key]);
  });
  window.addEventListener("hashchange", readFragment);

  fillSelect(
    "recording",
    recordings.map(({ run, mode, block_size }) => `${run}: ${mode}, blocks of ${block_size}`),
  );
  readFragment();
  viewer.hidden = false;
})();
