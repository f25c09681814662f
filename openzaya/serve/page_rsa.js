// --- Markovian RSA: what the settings ask for, and a run as it goes ---------------------------------
const RSA_NUMBERS = ["n", "c", "t", "beta", "tau"];
const COLOURS = 10;           // classes of answers with a colour of their own

function rsaWish() {
  const preset = at("rsa_preset").value;
  if (!preset) return undefined;
  const given = RSA_NUMBERS.map((name) => [name, at("rsa_" + name).value.trim()]).filter(([, value]) => value !== "");
  return Object.fromEntries([["preset", preset], ...given.map(([name, value]) => [name, Number(value)])]);
}
function showRsaFields() { at("rsa-numbers").hidden = !at("rsa_preset").value; }

// A run's population: a column for each round, a cell for each candidate, its colour its answer.
class RunTree {
  constructor() {
    this.box = element("section", "run");
    this.status = element("p", "run-status");
    this.population = element("div", "population");
    this.population.setAttribute("role", "group"); this.population.setAttribute("aria-label", "Candidates by round");
    this.lines = at("lines").content.firstElementChild.cloneNode(true);
    this.line = this.lines.firstElementChild;
    this.lines.replaceChildren();
    this.detail = element("div", "candidate"); this.detail.hidden = true;
    const scroll = element("div", "run-scroll");
    scroll.append(this.population);
    this.box.append(this.status, scroll, this.detail);
    this.cells = new Map(); this.counters = []; this.classes = new Map(); this.pinned = null;
    this.tokens = 0; this.done = 0; this.total = 0;
  }
  take(event) {
    if (event.event === "started") this.begin(event);
    else if (event.event === "launched") this.update(event, "running");
    else if (event.event === "candidate") { this.update(event, event.status); this.count(event); }
    else if (event.event === "round") this.endRound(event);
    else if (event.event === "selected") this.select(event.slots);
    else if (event.event === "finished") this.finish(event);
  }
  begin(event) {
    this.total = event.widths.reduce((sum, width) => sum + width, 0);
    this.population.append(this.lines);
    event.widths.forEach((width, round) => {
      const column = element("div", "column"), counter = element("span", "counter", "0/" + width), stack = element("div", "stack");
      column.append(element("h3", "", round + 1 === event.widths.length && round ? "Final round" : "Round " + round), counter, stack);
      for (let slot = 0; slot < width; slot++) column.append(this.cell(round, slot));
      this.counters.push({ node: counter, stack, width, ended: 0 });
      this.population.append(column);
    });
    for (const warning of event.warnings) this.box.insertBefore(element("p", "warning", warning), this.population.parentNode);
    this.say();
  }
  cell(round, slot) {
    const key = round + "." + slot;
    const made = button("", () => this.pin(this.pinned === key ? null : key));
    made.className = "cell waiting";
    made.setAttribute("aria-pressed", "false");
    for (const name of ["mouseenter", "focus"]) made.addEventListener(name, () => this.relate(key));
    for (const name of ["mouseleave", "blur"]) made.addEventListener(name, () => this.relate(this.pinned));
    this.cells.set(key, { node: made, round, slot, parents: [], status: "waiting", answer: null });
    this.label(this.cells.get(key));
    return made;
  }
  update(event, status) {
    const cell = this.cells.get(event.round + "." + event.slot);
    if (!cell) return;
    Object.assign(cell, event, { status, parents: event.parents });
    this.label(cell);
    if (this.pinned === event.round + "." + event.slot) this.describe(cell);
  }
  label(cell) {
    const answer = cell.status === "done" ? cell.answer ?? "no answer" : cell.status;
    cell.node.className = "cell " + cell.status + (cell.selected ? " selected" : "");
    cell.node.textContent = cell.slot + " " + (answer.length > 24 ? answer.slice(0, 23) + "…" : answer) + (cell.finish_reason === "length" ? " ✂" : "") + (cell.selected ? " ★" : "");
    cell.node.title = answer.slice(0, 300);
    cell.node.dataset.class = cell.status === "done" ? this.classOf(cell.answer) : "none";
  }
  classOf(answer) {
    if (answer === null || answer === undefined) return "none";
    if (!this.classes.has(answer)) this.classes.set(answer, this.classes.size);
    const index = this.classes.get(answer);
    return index < COLOURS ? String(index) : "other";
  }
  count(event) {
    const counter = this.counters[event.round];
    if (!counter) return;
    counter.ended += 1; this.done += 1; this.tokens += event.tokens ?? 0;
    counter.node.textContent = counter.ended + "/" + counter.width;
    this.say();
  }
  endRound(event) {
    // Answers that mean the same have got one name now.
    for (const [slot, answer] of Object.entries(event.slots)) {
      const cell = this.cells.get(event.round + "." + slot);
      if (cell) { cell.answer = answer; this.label(cell); }
    }
    const counter = this.counters[event.round];
    if (!counter) return;
    counter.node.textContent = event.done + "/" + counter.width + ", " + event.tokens + " tokens, " + event.seconds.toFixed(1) + " s";
    // How far the answers have converged: shares of the round, most frequent first.
    for (const [answer, count] of [...Object.entries(event.answers), [null, event.done - Object.values(event.answers).reduce((a, b) => a + b, 0)]]) {
      const segment = element("div");
      segment.dataset.class = this.classOf(answer);
      segment.title = count + " × " + (answer ?? "no answer").slice(0, 200);
      segment.style.flexGrow = String(count);
      if (count) counter.stack.append(segment);
    }
  }
  select(slots) {
    const last = Math.max(...[...this.cells.values()].filter((cell) => cell.status === "done").map((cell) => cell.round));
    for (const slot of slots) {
      const cell = this.cells.get(last + "." + slot);
      if (cell) { cell.selected = true; this.label(cell); }
    }
  }
  finish(event) {
    this.tokens = event.tokens;
    const remarks = [event.stopped_early, ...event.deviations.map((name) => "deviation: " + name)].filter(Boolean);
    this.status.textContent = ["Markovian RSA: " + event.tokens + " tokens in " + event.seconds.toFixed(1) + " s", ...remarks].join(" · ");
  }
  say() { this.status.textContent = "Markovian RSA: " + this.done + " of " + this.total + " candidates, " + this.tokens + " tokens"; }
  // Lines to the candidates that were in its prompt, and broken ones to those that had it in theirs.
  relate(key) {
    this.lines.replaceChildren();
    this.population.classList.toggle("quiet", key !== null);
    for (const { node } of this.cells.values()) node.classList.remove("near");
    if (key === null) return;
    const cell = this.cells.get(key);
    cell.node.classList.add("near");
    this.lines.setAttribute("width", this.population.scrollWidth); this.lines.setAttribute("height", this.population.scrollHeight);
    for (const slot of cell.parents) this.connect(this.cells.get(cell.round - 1 + "." + slot), cell, "");
    for (const other of this.cells.values()) {
      if (other.round === cell.round + 1 && other.parents.includes(cell.slot)) this.connect(cell, other, "after");
    }
  }
  connect(from, to, kind) {
    if (!from) return;
    const start = from.node.getBoundingClientRect(), end = to.node.getBoundingClientRect(), origin = this.population.getBoundingClientRect();
    const x1 = start.right - origin.left, y1 = start.top + start.height / 2 - origin.top;
    const x2 = end.left - origin.left, y2 = end.top + end.height / 2 - origin.top, bend = (x2 - x1) / 2;
    const path = this.line.cloneNode();
    path.setAttribute("d", `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`);
    if (kind) path.setAttribute("class", kind);
    this.lines.append(path);
    from.node.classList.add("near"); to.node.classList.add("near");
  }
  pin(key) {
    for (const [name, { node }] of this.cells) node.setAttribute("aria-pressed", String(name === key));
    this.pinned = key;
    this.relate(key);
    this.detail.hidden = key === null;
    if (key !== null) this.describe(this.cells.get(key));
  }
  describe(cell) {
    const facts = ["round " + cell.round + ", candidate " + cell.slot, cell.status];
    if (cell.parents.length) facts.push("read the tails of " + cell.parents.join(", "));
    if (cell.tokens !== undefined) facts.push(cell.tokens + " tokens", cell.seconds.toFixed(1) + " s");
    if (cell.finish_reason === "length") facts.push("cut off at its budget");
    const texts = [["Error", cell.error], ["Answer", cell.answer], ["Text", cell.content], ["End of the reasoning", cell.reasoning]];
    this.detail.replaceChildren(element("p", "run-status", facts.join(" · ")));
    for (const [title, text] of texts) if (text) this.detail.append(element("h4", "", title), element("pre", "", text));
  }
}
at("rsa_preset").addEventListener("change", showRsaFields);
