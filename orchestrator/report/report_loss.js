"use strict";
// The figures of the expected loss; see report_figures.js.

function drawHulls(width, theme) {
  const [layer, block, point, bytes, loss] =
    ["layer", "block", "point", "bytes", "expected_loss"].map((name) => tables.hulls.column(name));
  const [unit, scale] = byteUnit(largest(bytes));
  const most = Math.max(largest(layer), 1);
  const colors = range(9).map((step) => colorAt(SCALES.density, theme.dark ? 0.25 + (step / 8) * 0.75 : (step / 8) * 0.85));
  const lines = new Map();
  for (const at of range(tables.hulls.length)) {
    if (point[at] !== "hull" || !(loss[at] > 0)) continue; // A logarithm has no zero.
    if (!lines.has(block[at])) lines.set(block[at], { layer: layer[at], x: [], y: [] });
    lines.get(block[at]).x.push(bytes[at] / scale);
    lines.get(block[at]).y.push(loss[at]);
  }
  const traces = [...lines].map(([name, line]) => ({
    type: "scatter", mode: "lines", x: line.x, y: line.y, showlegend: false,
    line: { width: lines.size > 40 ? 1 : 1.6, color: colorAt(colors, line.layer / most) },
    hovertemplate: `${plain(name)}: %{x:.4~g} ${unit}<br>expected %{y:.3~g} nats per token<extra></extra>`,
  }));
  const stored = range(tables.hulls.length).filter((at) => point[at] === "stored" && loss[at] > 0);
  traces.push({
    type: "scatter", mode: "markers", x: stored.map((at) => bytes[at] / scale), y: stored.map((at) => loss[at]),
    text: stored.map((at) => plain(block[at])), showlegend: false,
    hovertemplate: `%{text} as stored: %{x:.4~g} ${unit}<br>expected %{y:.3~g} nats per token<extra></extra>`,
    marker: {
      size: stored.length > 40 ? 5 : 8, color: stored.map((at) => layer[at]), cmin: 0, cmax: most, colorscale: scaleOf(colors),
      line: { width: 1, color: theme.surface }, showscale: stored.length > 1,
      colorbar: { title: { text: "layer", side: "right" }, thickness: 10, outlinewidth: 0, tickformat: "d", nticks: 5 },
    },
  });
  const layout = {
    height: 380,
    xaxis: axis(theme, unit, { rangemode: "tozero", zeroline: false }),
    yaxis: axis(theme, "expected loss, nats per token (log scale)", { type: "log", ...logTicks(loss) }),
  };
  return { traces, layout };
}

function drawDivergences(width, theme) {
  const [block, expected, measured, stderr] =
    ["block", "expected_loss", "measured", "stderr"].map((name) => tables.divergences.column(name));
  const known = range(tables.divergences.length).filter((at) => expected[at] > 0 && measured[at] > 0);
  const values = known.flatMap((at) => [expected[at], measured[at]]);
  const ends = [values.reduce((a, b) => Math.min(a, b), Infinity), largest(values)];
  const traces = [{
    type: "scatter", mode: "lines", x: ends, y: ends, name: "as expected", hoverinfo: "skip",
    line: { width: 1, dash: "dot", color: theme.text },
  }, ...[["one block compressed", theme.accent, "circle"], ["the model", theme.second, "diamond"]].map(([name, color, symbol], whole) => {
    const chosen = known.filter((at) => (block[at] === "model") === Boolean(whole));
    return {
      type: "scatter", mode: "markers", name, x: chosen.map((at) => expected[at]), y: chosen.map((at) => measured[at]),
      error_y: { type: "data", array: chosen.map((at) => stderr[at] ?? 0), thickness: 1, width: 0, color },
      text: chosen.map((at) => plain(block[at])), marker: { size: 8, color, symbol },
      hovertemplate: "%{text}<br>expected %{x:.3~g}, measured %{y:.3~g} nats per token<extra></extra>",
    };
  })];
  const layout = {
    height: 380,
    xaxis: axis(theme, "expected loss", { type: "log", ...logTicks(known.map((at) => expected[at])) }),
    yaxis: axis(theme, "measured divergence", { type: "log", ...logTicks(known.map((at) => measured[at])) }),
    legend: legendAbove(),
  };
  return { traces, layout };
}

Object.assign(DRAW, { hulls: drawHulls, divergences: drawDivergences });
