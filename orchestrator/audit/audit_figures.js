"use strict";
// The figures of an audit, beside those of reports: see report_figures.js and report.js.

const SHARED = ["tucker", "lestd"];
const LINES = { svd: "#0072b2", tucker: "#e69f00", lestd: "#d55e00", magnitude: "#009e73", rtn: "#8c8c8c" };
const DASHES = { 16: "solid", 8: "dash", 4: "dot" };

const chosenRows = (table, wanted) => {
  const columns = Object.entries(wanted).map(([name, value]) => [table.column(name), value]);
  return range(table.length).filter((row) => columns.every(([values, value]) => values[row] === value));
};

function heat(theme, x, y, z, title, more) {
  return {
    type: "heatmap", x: x.map(plain), y: y.map(plain), z, colorscale: scaleOf(SCALES.density), hoverongaps: false,
    colorbar: { title: { text: title, side: "right" }, thickness: 10, outlinewidth: 0, nticks: 6 },
    ...more,
  };
}

function drawPairs(width, theme) {
  const table = tables.pairs;
  const rows = chosenRows(table, { block: choice("pairs-block"), choice: choice("pairs-choice") });
  const [basis, unit, energy, random] = ["basis", "unit", "energy", "random"].map((name) => table.column(name));
  const names = unique(rows.map((row) => basis[row]));
  const at = new Map(names.map((name, index) => [name, index]));
  const z = names.map(() => names.map(() => null));
  for (const row of rows) z[at.get(basis[row])][at.get(unit[row])] = energy[row];
  const least = rows.reduce((low, row) => Math.min(low, random[row]), 1);
  const trace = heat(theme, names, names, z, "share of the energy", {
    zmin: least, zmax: 1, hovertemplate: "basis of %{y} on %{x}: %{z:.4f}<extra></extra>",
  });
  const layout = {
    height: clamp(names.length * 22, 160, 620) + 90,
    xaxis: axis(theme, "on", { type: "category", showgrid: false }),
    yaxis: axis(theme, "basis of", { type: "category", autorange: "reversed", showgrid: false }),
  };
  return { traces: [trace], layout };
}

function drawAcross(width, theme) {
  const table = tables.across;
  const rows = chosenRows(table, { scope: choice("across-scope"), kind: choice("across-kind") });
  const [layer, reference, rank, margin] = ["layer", "reference", "rank", "margin"].map((name) => table.column(name));
  const layers = unique(rows.map((row) => layer[row])).sort((a, b) => a - b);
  rows.sort((a, b) => reference[a] - reference[b] || rank[a] - rank[b]);
  const names = unique(rows.map((row) => `layer ${reference[row]}, R = ${rank[row]}`));
  const at = new Map(names.map((name, index) => [name, index]));
  const z = names.map(() => layers.map(() => null));
  for (const row of rows) z[at.get(`layer ${reference[row]}, R = ${rank[row]}`)][layers.indexOf(layer[row])] = margin[row];
  const trace = heat(theme, layers.map((one) => `layer ${one}`), names, z, "margin", {
    zmin: 0, zmax: 1, hovertemplate: "basis of %{y}, on %{x}: %{z:.3f}<extra></extra>",
  });
  const layout = {
    height: clamp(names.length * 28, 120, 500) + 90,
    xaxis: axis(theme, "on", { type: "category", showgrid: false }),
    yaxis: axis(theme, "", { type: "category", autorange: "reversed", showgrid: false }),
  };
  return { traces: [trace], layout };
}

function drawAuditSpectra(width, theme) {
  const table = tables.spectra;
  const wanted = Number(choice("spectra-mode"));
  const [block, layer, index, value] = ["block", "layer", "index", "singular_value"].map((name) => table.column(name));
  const lines = new Map();
  for (const row of chosenRows(table, { mode: wanted })) {
    if (!lines.has(block[row])) lines.set(block[row], { layer: layer[row], x: [], y: [] });
    const line = lines.get(block[row]);
    line.x.push(index[row]);
    line.y.push(value[row]);
  }
  const most = Math.max(largest(layer), 1);
  const colors = range(9).map((step) => colorAt(SCALES.density, theme.dark ? 0.25 + (step / 8) * 0.75 : (step / 8) * 0.85));
  const traces = [...lines].map(([name, line]) => ({
    type: "scatter", mode: "lines", showlegend: false, x: line.x,
    y: line.y.map((one) => (one > 0 ? one / line.y[0] : null)), // A logarithm has no zero.
    line: { width: lines.size > 40 ? 1 : 1.6, color: colorAt(colors, line.layer / most) },
    hovertemplate: `${plain(name)}<br>singular value %{x}: %{y:.3~g} of the largest<extra></extra>`,
  }));
  const layout = {
    height: 360,
    xaxis: axis(theme, `index of the singular value, mode ${wanted}`, { rangemode: "tozero", zeroline: false }),
    yaxis: axis(theme, "of the largest (log scale)", { type: "log", ...logTicks(traces.flatMap(({ y }) => y)) }),
  };
  return { traces, layout };
}

function drawPredictions(width, theme) {
  const table = tables.predictions;
  const rows = chosenRows(table, { block: choice("predictions-block") });
  const [method, size, error] = ["method", "stored_keep", "relative_error"].map((name) => table.column(name));
  const family = (name) => name.split(" ")[0];
  const bits = (name) => Number(name.split(" ")[1]?.split("-")[0] ?? 16);
  // All sizes of rounding are one line: each has one size only.
  const lineOf = (name) => (family(name) === "rtn" ? "rtn" : name);
  const traces = unique(rows.map((row) => lineOf(method[row]))).map((name) => {
    const own = rows.filter((row) => lineOf(method[row]) === name).sort((a, b) => size[a] - size[b]);
    return {
      type: "scatter", mode: "lines+markers", name, x: own.map((row) => size[row]), y: own.map((row) => error[row]),
      text: own.map((row) => method[row]), hovertemplate: "%{text}: %{y:.4f} in %{x:.3f} of the bytes<extra></extra>",
      line: { color: LINES[family(name)] ?? theme.accent, dash: DASHES[bits(name)], width: SHARED.includes(family(name)) ? 2.5 : 1.2 },
      marker: { size: 5, symbol: SHARED.includes(family(name)) ? "circle" : "x" },
    };
  });
  const layout = {
    height: 420,
    xaxis: axis(theme, "stored bytes / dense bytes", { rangemode: "tozero" }),
    yaxis: axis(theme, "relative error (log scale)", { type: "log", ...logTicks(rows.map((row) => error[row])) }),
    legend: { orientation: width < 720 ? "h" : "v" },
  };
  return { traces, layout };
}

Object.assign(DRAW, { pairs: drawPairs, across: drawAcross, spectra: drawAuditSpectra, predictions: drawPredictions });
