// the list of examples: cards that are made as they come into view, searched, filtered and ordered

const examples = embedded("examples");
const STEP = 12;
const WORD = /[\p{L}\p{N}][\p{L}\p{N}_’']*/gu;
const COMMON = new Set(
  "about after also been before both could does each from have here into just like make many more most much only other over same should some such than that their them then there these they this those very want were what when where which will with would your".split(" "),
);

function element(kind, name = "", text = "") {
  const made = document.createElement(kind);
  if (name) made.className = name;
  made.textContent = text; // texts are set as text and never read as HTML
  return made;
}

function turnsOf(turns) {
  const made = element("div", "turns");
  for (const [role, text] of turns) {
    const turn = made.appendChild(element("div", "turn"));
    turn.dataset.role = role;
    if (role) turn.append(element("p", "role", role));
    turn.appendChild(element("p", "text", text)).dir = "auto";
  }
  return made;
}

const telling = (word) => !COMMON.has(word) && (word.length > 3 || /\d\d/.test(word));
const wordsOf = (side) =>
  new Set((side.textContent.toLowerCase().match(WORD) ?? []).filter(telling));

// mark the words that the example and the target example have in common, on both sides
function markShared(pair) {
  const [left, right] = pair.children;
  if (!right) return;
  const texts = (side) => side.querySelector(".turns");
  const others = wordsOf(texts(right));
  const shared = new Set([...wordsOf(texts(left))].filter((word) => others.has(word)));
  for (const text of pair.querySelectorAll(".text")) {
    const parts = [];
    let end = 0;
    for (const { 0: word, index } of text.textContent.matchAll(WORD)) {
      if (!shared.has(word.toLowerCase())) continue;
      parts.push(text.textContent.slice(end, index), element("mark", "", word));
      end = index + word.length;
    }
    text.replaceChildren(...parts, text.textContent.slice(end));
  }
}

function cardOf(row, winners) {
  const card = element("article", "card");
  const facts = card.appendChild(element("p", "facts"));
  facts.append(element("b", "status", row.status), element("span", "", row.source));
  facts.append(element("span", "", `place ${row.place.toLocaleString("en")}`));
  facts.append(element("span", "", `score ${row.score.toFixed(3)}`));
  if (row.share !== null) {
    facts.append(element("span", "", `${(100 * row.share).toFixed(0)} % within the subspace`));
  }
  facts.append(element("span", "", `${row.tokens.toLocaleString("en")} tokens`));
  const pair = card.appendChild(element("div", "pair"));
  pair.appendChild(element("div")).append(element("p", "label", row.id), turnsOf(row.turns));
  if (row.best !== null) {
    const winner = pair.appendChild(element("div", "winner"));
    const [name, turns] = winners[row.best];
    winner.append(element("p", "label", `like ${name}`), turnsOf(turns));
    markShared(pair);
  }
  return card;
}

// a long card is cut, and says so
function fold(card) {
  const sides = [...card.querySelectorAll(".turns")];
  const long = sides.filter((side) => side.scrollHeight > side.clientHeight + 4);
  if (!long.length) return;
  long.forEach((side) => side.classList.add("long"));
  card.classList.add("cut");
  const button = card.appendChild(element("button", "whole", "Show all of it"));
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => {
    const cut = card.classList.toggle("cut");
    card.classList.toggle("open", !cut);
    button.setAttribute("aria-expanded", String(!cut));
    button.textContent = cut ? "Show all of it" : "Show less";
  });
}

const FIELDS = ["status", "place", "score", "share", "source", "tokens", "id", "turns", "best"];

function listExamples(section) {
  const list = section.querySelector(".cards");
  const { rows, winners } = examples[list.dataset.page];
  const form = section.querySelector("form");
  const more = section.querySelector(".more");
  const all = rows.map((row) => Object.fromEntries(FIELDS.map((name, n) => [name, row[n]])));
  for (const row of all) {
    const [name, turns] = winners[row.best] ?? ["", []];
    const texts = [...row.turns, ...turns].map(([, text]) => text);
    row.text = [row.status, row.source, row.id, name, ...texts].join(" ").toLowerCase();
  }
  for (const name of ["status", "source"]) {
    const values = [...new Set(all.map((row) => row[name]))];
    if (name === "source") values.sort();
    form.elements[name].append(...values.map((value) => new Option(value, value)));
  }
  let found = [];
  function show(count) {
    const start = list.childElementCount;
    const made = found.slice(start, start + count).map((row) => cardOf(row, winners));
    list.append(...made);
    made.forEach(fold);
    const shown = list.childElementCount;
    section.querySelector(".found").textContent = found.length
      ? `${shown} of ${found.length.toLocaleString("en")} examples`
      : "No example is like that.";
    more.hidden = shown === found.length;
    return made[0];
  }
  function search() {
    const value = (name) => form.elements[name].value;
    const words = value("text").toLowerCase().split(/\s+/).filter(Boolean);
    const [, down, key] = /^(-?)(\w+)$/.exec(value("order"));
    const kept = ["status", "source"].filter((name) => value(name));
    found = all
      .filter((row) => kept.every((name) => row[name] === value(name)))
      .filter((row) => words.every((word) => row.text.includes(word)))
      .sort((a, b) => (down ? b[key] - a[key] : a[key] - b[key]) || a.place - b.place);
    list.replaceChildren();
    show(STEP);
  }
  form.addEventListener("input", search);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const first = show(STEP);
    first.tabIndex = -1;
    first.focus({ preventScroll: true });
  });
  search();
}
