"use strict";
// Draws the figures, follows the theme and the width, and shows the numbers behind each figure.
// All text of the manifest goes into the page as text, never as markup.

const ROWS_AT_A_TIME = 500;
const page = JSON.parse(document.getElementById("data").textContent);

class Table {
  constructor({ columns, data }) {
    this.columns = columns;
    this.data = new Map(columns.map((column, index) => [column.name, data[index]]));
    this.length = data.length ? data[0].length : 0;
  }

  column(name) {
    return this.data.get(name);
  }

  csv(names) {
    const cell = (value) => {
      const text = value === null ? "" : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
    };
    const columns = names.map((name) => this.column(name));
    const lines = [names.map(cell).join(",")];
    for (let row = 0; row < this.length; row += 1) lines.push(columns.map((values) => cell(values[row])).join(","));
    return `${lines.join("\r\n")}\r\n`;
  }
}

const tables = Object.fromEntries(Object.entries(page.tables).map(([name, table]) => [name, new Table(table)]));

function choice(name) {
  const control = document.querySelector(`select[name="${name}"], [name="${name}"]:checked`);
  return control?.value;
}

// -- figures -------------------------------------------------------------------------------------

let printing = false;

function currentTheme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["text", "muted", "line", "surface", "accent", "second", "faint", "bad"];
  const colors = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  const dark = !printing && matchMedia("(prefers-color-scheme: dark)").matches;
  // Where a finger scrolls the page, figures do not zoom.
  return { ...colors, dark, touch: matchMedia("(pointer: coarse), (max-width: 40rem)").matches };
}

function draw(figure) {
  const holder = figure.querySelector(".plot");
  const theme = currentTheme();
  const width = printing ? 660 : holder.clientWidth;
  const { traces, layout } = DRAW[figure.dataset.figure](width, theme);
  const config = {
    displaylogo: false,
    displayModeBar: theme.touch ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { filename: figure.dataset.figure },
  };
  Plotly.react(holder, traces, {
    width,
    margin: { l: 50, r: 10, t: 30, b: 46 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: theme.text },
    hoverlabel: { bgcolor: theme.surface, bordercolor: theme.line, font: { color: theme.text } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.text },
    dragmode: theme.touch ? false : "zoom",
    ...layout,
  }, config);
}

const element = (name, text, parent) => {
  const made = document.createElement(name);
  made.textContent = text;
  parent?.append(made);
  return made;
};

const figures = [...document.querySelectorAll("figure[data-figure]")];

function drawAll() {
  figures.forEach(draw);
  // What is drawn, for whoever waits for it.
  document.documentElement.dataset.drawn = `${currentTheme().dark ? "dark" : "light"} ${document.documentElement.clientWidth}`;
}

for (const figure of figures) {
  figure.addEventListener("change", () => draw(figure));
}

for (const key of document.querySelectorAll(".key")) {
  for (const [name, color] of Object.values(STAGES)) {
    const entry = document.createElement("li");
    entry.style.setProperty("--color", color);
    entry.textContent = name;
    key.append(entry);
  }
  if ("curves" in key.dataset) element("li", "striped: pass one, the curves", key).className = "curve";
}

let width = document.documentElement.clientWidth;
let waiting = 0;
addEventListener("resize", () => {
  if (document.documentElement.clientWidth === width) return; // A phone hides its address bar.
  width = document.documentElement.clientWidth;
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 100);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
for (const [event, state] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    printing = state;
    document.documentElement.classList.toggle("print", state);
    drawAll();
  });
}

// -- numbers -------------------------------------------------------------------------------------

// How the values of a column read: numbers with the same decimals, six digits of the largest.
function formatOf(values) {
  const numbers = values.filter((value) => typeof value === "number");
  const most = largest(numbers.map(Math.abs));
  const places = numbers.every(Number.isInteger) ? 0 : clamp(5 - Math.floor(Math.log10(most)), 0, 9);
  const text = (value) => {
    if (typeof value !== "number") return value === null ? "" : String(value);
    const fixed = value.toFixed(places);
    const lost = Math.abs(Number(fixed) - value) > 0.01 * Math.abs(value);
    return lost ? String(Number(value.toPrecision(3))) : fixed;
  };
  return { text, className: numbers.length ? "number" : "" };
}

// A table whose rows come in portions, sorted by the column that was asked for.
function buildTable(holder, table, names) {
  const columns = table.columns.filter((column) => names.includes(column.name))
    .map((column) => ({ ...column, ...formatOf(table.column(column.name)) }));
  const order = Array.from({ length: table.length }, (_, index) => index);
  const box = element("div", "", holder);
  box.className = "scroll";
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "numbers");
  const made = element("table", "", box);
  const head = element("tr", "", element("thead", "", made));
  const body = element("tbody", "", made);
  const more = element("button", "", holder);
  more.type = "button";

  const show = () => {
    const begin = body.rows.length;
    for (const row of order.slice(begin, begin + ROWS_AT_A_TIME)) {
      const line = element("tr", "", body);
      for (const column of columns) {
        const text = column.text(table.column(column.name)[row]);
        element("td", text, line).className = column.className || (text.length > 60 ? "words" : "");
      }
    }
    more.hidden = body.rows.length >= table.length;
    more.textContent = `Show more: ${body.rows.length} of ${table.length} rows are here`;
  };
  more.addEventListener("click", show);

  for (const column of columns) {
    const cell = element("th", "", head);
    cell.scope = "col";
    cell.className = column.className;
    cell.title = column.meaning;
    const named = !column.unit || column.name.split("_").includes(column.unit);
    const button = element("button", named ? column.name : `${column.name} (${column.unit})`, cell);
    button.type = "button";
    button.addEventListener("click", () => {
      const down = cell.ariaSort === "ascending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.ariaSort = down ? "descending" : "ascending";
      const values = table.column(column.name);
      const compare = (a, b) => {
        if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null);
        const less = typeof values[a] === "number" ? values[a] - values[b] : String(values[a]).localeCompare(values[b]);
        return (down ? -less : less) || a - b;
      };
      order.sort(compare);
      body.replaceChildren();
      show();
    });
  }
  show();
}

for (const numbers of document.querySelectorAll(".numbers")) {
  const table = tables[numbers.dataset.table];
  const names = numbers.dataset.columns ? numbers.dataset.columns.split(" ") : table.columns.map((column) => column.name);
  const details = numbers.querySelector("details");
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) buildTable(details, table, names);
  });
  numbers.querySelector(".csv").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([table.csv(names)], { type: "text/csv" }));
    link.download = `${numbers.dataset.file}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

drawAll();
