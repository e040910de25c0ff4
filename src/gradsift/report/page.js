"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures");
const tables = read("tables");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// the page's own colours: figures have none but those of their data
function colours() {
  const colour = dark.matches ? "#ddd" : "#222";
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": colour };
}

function draw(place) {
  const { data, layout } = figures[place.dataset.target][place.dataset.figure];
  const axes = Object.keys(layout).filter((key) => /^[xy]axis/.test(key));
  for (const name of new Set([...axes, "xaxis", "yaxis"])) {
    layout[name] = { gridcolor: "#8884", zerolinecolor: "#8886", automargin: true, ...layout[name] };
  }
  layout.margin = { l: 60, r: 20, t: 70, b: 50, ...layout.margin };
  layout.legend = { orientation: "h", y: 1.2, ...layout.legend };
  Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false }).then(() =>
    Plotly.relayout(place, colours()));
}

function short(text) {
  const line = text.replace(/\s+/g, " ");
  return line.length > 110 ? line.slice(0, 110) + " …" : line;
}

// a cell that opens; texts are set as text and never read as HTML
function folded(summary, text) {
  const details = document.createElement("details");
  details.append(document.createElement("summary"), document.createElement("pre"));
  details.firstChild.textContent = summary;
  details.lastChild.textContent = text;
  return details;
}

function fill(DataTable, element) {
  const { rows, winners } = tables[element.dataset.target];
  const plain = DataTable.render.text();
  const number = (digits) => ({ render: (value, kind) =>
    value === null ? "" : kind === "display" ? value.toFixed(digits) : value });
  const opened = (summary, text) => (value, kind, row) =>
    kind === "display" ? folded(summary(value), text(value)) : `${value ?? ""} ${text(value)}`;
  const winner = (id) => (id === null ? "" : winners[id] ?? "");
  const table = new DataTable(element, {
    data: rows,
    order: [[1, "asc"]],
    pageLength: 10,
    deferRender: true,
    autoWidth: false,
    columns: [
      { title: "status", render: plain },
      { title: "place" },
      { title: "score", ...number(4) },
      { title: "share", ...number(3) },
      { title: "source", render: plain },
      { title: "tokens" },
      { title: "id", render: plain },
      { title: "example", render: opened(short, (text) => text) },
      { title: "won by", render: opened((id) => id ?? "", winner) },
    ],
  });
  for (const select of element.closest("section").querySelectorAll(".filters select")) {
    const column = table.column(Number(select.dataset.column));
    select.append(new Option("all", ""));
    for (const value of new Set(column.data().toArray())) select.append(new Option(value, value));
    select.addEventListener("change", () =>
      column.search(select.value ? (text) => text === select.value : "").draw());
  }
}

const library = import("data:text/javascript;base64," + document.getElementById("datatables").textContent);

function open(panel) {
  if (panel.dataset.opened) {
    panel.querySelectorAll(".figure").forEach((place) => Plotly.Plots.resize(place));
    return;
  }
  panel.dataset.opened = "yes";
  panel.querySelectorAll(".figure").forEach(draw);
  library.then(({ default: DataTable }) =>
    panel.querySelectorAll("table.examples").forEach((element) => fill(DataTable, element)));
}

const tabs = [...document.querySelectorAll("[role=tab]")];
function choose(tab) {
  for (const other of tabs) {
    const panel = document.getElementById(other.getAttribute("aria-controls"));
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    panel.hidden = other !== tab;
    if (other === tab) open(panel);
  }
}
tabs.forEach((tab, number) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(number + step + tabs.length) % tabs.length];
    next.focus();
    choose(next);
  });
});
const dress = () => {
  document.documentElement.classList.toggle("dark", dark.matches); // what DataTables looks at
  document.querySelectorAll(".figure.js-plotly-plot").forEach((f) => Plotly.relayout(f, colours()));
};
dark.addEventListener("change", dress);
dress();
choose(tabs[0]);
