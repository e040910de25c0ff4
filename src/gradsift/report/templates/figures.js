"use strict";
// figures: Plotly's, in the page's own colours and type, as wide as their place

const embedded = (name) =>
  JSON.parse(document.querySelector(`script[data-name="${name}"]`).textContent);
const drawings = embedded("figures");
const NARROW = 560; // pixels: two plots stand one above the other
const SQUARE = 760; // pixels across a matrix, where there is room
const PAPER = 660; // pixels across a printed page

const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;

// what a colour of page.css is now, in this scheme
function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

// a copy with every colour that is only named put in
function coloured(value) {
  if (typeof value === "string") {
    const name = /^var\((--[\w-]+)\)$/.exec(value);
    return name ? colour(name[1]) : value;
  }
  if (Array.isArray(value)) return value.map(coloured);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
}

function stack(layout) {
  Object.assign(layout.xaxis, { domain: [0, 1] });
  Object.assign(layout.xaxis2, { domain: [0, 1] });
  Object.assign(layout.yaxis, { domain: [0.6, 1] });
  Object.assign(layout.yaxis2, { domain: [0, 0.38] });
  const titles = layout.annotations.filter((note) => note.yref === "paper" && note.y === 1);
  titles.forEach((title, number) => Object.assign(title, { x: 0.5, y: [1, 0.38][number] }));
  layout.height *= 1.8;
}

function dressed(data, layout, width) {
  const [line, text, muted] = ["--line", "--text", "--muted"].map(colour);
  const plain = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
  for (const name of new Set([...axes, "xaxis", "yaxis"])) {
    const { title, ...own } = layout[name] ?? {};
    const upright = name.startsWith("y");
    layout[name] = { ...plain, showgrid: upright, zeroline: upright, ...own };
    layout[name].title = { standoff: 10, ...title, font: { color: muted, size: 12.5 } };
  }
  const matrix = data.some((trace) => trace.type === "heatmap");
  if (width < NARROW && layout.xaxis2) stack(layout);
  if (width < NARROW && matrix) {
    layout.xaxis.showticklabels = layout.yaxis.showticklabels = false;
    layout.height = width;
  }
  const above = data.length > 1 || layout.annotations?.length; // a legend, or titles
  for (const note of layout.annotations ?? []) note.font = { size: 12.5, color: text };
  return {
    bargap: 0.4,
    ...layout,
    width: matrix ? Math.min(width, SQUARE) : width,
    dragmode: false, // a finger on a figure scrolls the page
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: muted },
    hoverlabel: { bgcolor: colour("--surface"), bordercolor: line, font: { color: text } },
    margin: { l: 56, r: 16, t: above ? 56 : 20, b: 48, ...layout.margin },
    legend: { orientation: "h", x: 0, y: 1.1, yanchor: "bottom", ...layout.legend },
  };
}

function draw(place, width = place.clientWidth) {
  const { data, layout } = coloured(drawings[place.dataset.page][place.dataset.figure]);
  const config = { displayModeBar: false, showTips: false };
  return Plotly.react(place, data, dressed(data, layout, width), config);
}

const drawn = (panel) => [...panel.querySelectorAll(".figure")];
const drawAll = (panel, width) => Promise.all(drawn(panel).map((place) => draw(place, width)));
