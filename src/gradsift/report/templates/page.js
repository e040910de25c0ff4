// tabs and contents, both in the address: report.html#gsm8k/sure

const tabs = [...document.querySelectorAll("[role=tab]")];
const lists = [...document.querySelectorAll(".contents ol")];
const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
let chosen = null;
let ready = false; // Plotly is there

function open(panel) {
  if (!ready) return;
  if (!panel.dataset.opened) {
    panel.dataset.opened = "yes";
    panel.querySelectorAll(".first .pair").forEach(markShared);
    panel.querySelectorAll("section:has(> .cards)").forEach(listExamples);
  }
  drawAll(panel);
}

function choose(tab) {
  if (tab === chosen) return;
  chosen = tab;
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    panelOf(other).hidden = other !== tab;
  }
  for (const list of lists) list.hidden = list.dataset.page !== panelOf(tab).id;
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  open(panelOf(tab));
}

function address() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

function follow() {
  const id = address();
  const named = tabs.find((tab) => panelOf(tab).id === id.split("/")[0]);
  choose(named ?? (id && chosen ? chosen : tabs[0])); // "/run" is of no target
  document.getElementById(id)?.scrollIntoView();
}

addEventListener("hashchange", follow);
for (const [number, tab] of tabs.entries()) {
  tab.addEventListener("keydown", (event) => {
    const last = tabs.length - 1;
    const next = { ArrowRight: number === last ? 0 : number + 1, Home: 0,
                   ArrowLeft: number === 0 ? last : number - 1, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    location.hash = tabs[next].hash;
    tabs[next].focus({ preventScroll: true });
  });
}

const seen = new IntersectionObserver(
  (entries) => {
    for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
      for (const link of document.querySelectorAll(".contents a")) {
        const here = decodeURIComponent(link.hash.slice(1)) === target.id;
        if (here) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
        const list = link.closest("ol");
        if (here && !list.hidden) list.scrollLeft = link.offsetLeft - list.clientWidth / 3;
      }
    }
  },
  { rootMargin: "-15% 0px -80% 0px" },
);
document.querySelectorAll("section").forEach((section) => seen.observe(section));

const root = document.documentElement;
function redraw() {
  if (ready && !root.classList.contains("printing")) drawAll(panelOf(chosen));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone hides its bars
  width = innerWidth;
  requestAnimationFrame(redraw);
});

// on paper: the chosen target, light, what is folded in it laid open
let unfolded = [];
addEventListener("beforeprint", () => {
  root.classList.add("printing");
  unfolded = [...panelOf(chosen).querySelectorAll("details:not([open])")];
  unfolded.forEach((details) => (details.open = true));
  drawAll(panelOf(chosen), PAPER);
});
addEventListener("afterprint", () => {
  root.classList.remove("printing");
  unfolded.forEach((details) => (details.open = false));
  redraw();
});

follow();
addEventListener("DOMContentLoaded", () => {
  ready = true;
  open(panelOf(chosen));
  if (location.hash) follow(); // figures have their heights now
});
