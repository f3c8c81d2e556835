"use strict";
// The figures of the report: each is a function of the width in pixels and the colors of the theme,
// which gives what Plotly draws. Their numbers are the columns of `tables`; see report.js.

// Names come from checkpoints and machines, and Plotly reads markup in them.
const plain = (text) =>
  String(text ?? "").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const range = (count) => Array.from({ length: count }, (_, index) => index);
const unique = (values) => [...new Set(values)];
const largest = (values) => values.reduce((most, value) => Math.max(most, value ?? 0), 0);
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);
const shown = (value, digits = 4) => (value == null ? "unknown" : Number(value.toPrecision(digits)));

const STAGES = {
  read: ["read", "#56b4e9"],
  stage1: ["Stage I: shared basis", "#0072b2"],
  rank_search: ["rank search", "#009e73"],
  stage2: ["Stage II: sparse cores", "#e69f00"],
  error: ["error as stored", "#cc79a7"],
  write: ["write", "#8c8c8c"],
};
// Perceptually uniform and readable without red and green: Viridis, Inferno, Cividis.
const SCALES = {
  density: ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"],
  relative_error: ["#000004", "#1b0c41", "#4a0c6b", "#781c6d", "#a52c60", "#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4"],
  energy_share: ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"],
};
const METRICS = {
  density: "density: non-zeros / elements of the core slice",
  relative_error: "relative error ‖W − Ŵ‖ / ‖W‖",
  energy_share: "energy kept ‖M‖² / ‖W‖²",
};
const PROJECTIONS = { q: "queries", k: "keys", v: "values", o: "output" };

const scaleOf = (colors) => colors.map((color, index) => [index / (colors.length - 1), color]);

function colorAt(colors, share) {
  const place = clamp(share, 0, 1) * (colors.length - 1);
  const below = Math.min(Math.floor(place), colors.length - 2);
  const channels = [below, below + 1].map((index) =>
    [1, 3, 5].map((at) => parseInt(colors[index].slice(at, at + 2), 16)));
  const mixed = channels[0].map((c, i) => Math.round(c + (channels[1][i] - c) * (place - below)));
  return `#${mixed.map((channel) => channel.toString(16).padStart(2, "0")).join("")}`;
}

// All planned layers by number, finished or not; by name where several share a number.
function layerAxis() {
  const missing = page.missing.map(([layer, block]) => ({ layer, block }));
  const groups = tables.layers.column("block");
  const all = [...tables.layers.column("layer").map((layer, row) => ({ layer, block: groups[row] })), ...missing];
  const shared = unique(all.map((one) => one.layer)).length < all.length;
  const of = shared ? (layer, block) => plain(block) : (layer) => layer;
  const inOrder = (a, b) => a.layer - b.layer || (a.block < b.block ? -1 : 1);
  const names = shared
    ? all.sort(inOrder).map(({ block }) => plain(block))
    : range(largest(all.map((one) => one.layer)) + 1);
  const type = shared ? { type: "category", categoryorder: "array", categoryarray: names } : { type: "linear" };
  return { names, of, type, ends: [-0.5, names.length - 0.5], missing: missing.map(({ layer, block }) => of(layer, block)) };
}

function unitOf(largestValue, units) {
  return units.findLast(([, scale]) => largestValue >= scale) ?? units[0];
}
const byteUnit = (most) =>
  unitOf(most, [["bytes", 1], ["KiB", 2 ** 10], ["MiB", 2 ** 20], ["GiB", 2 ** 30], ["TiB", 2 ** 40]]);
const timeUnit = (most) => unitOf(most, [["s", 1], ["min", 120], ["h", 7200]]);
const seconds = { s: 1, min: 60, h: 3600 };

function axis(theme, title, more = {}) {
  return {
    title: { text: title, standoff: 8 },
    gridcolor: theme.line,
    zerolinecolor: theme.line,
    linecolor: theme.line,
    automargin: true,
    fixedrange: theme.touch,
    ...more,
  };
}

const wholeTicks = (count) => ({ tick0: 0, dtick: count > 12 ? undefined : 1, tickformat: "d" });

function drawHeads(width, theme) {
  const heads = tables.heads;
  const metric = choice("heads-metric");
  const rows = layerAxis();
  const projections = unique(heads.column("projection"));
  const panels = Math.min(projections.length, width >= 720 ? 4 : 2);
  const lines = Math.ceil(projections.length / panels);
  const [top, bottom, left, right, across, between] = [86, 46, 50, 12, 34, 58];
  const tall = clamp(rows.names.length * 18, 130, 620);
  const height = top + bottom + lines * tall + (lines - 1) * between;
  const wide = (width - left - right - (panels - 1) * across) / panels;
  const [inner, outer] = [width - left - right, height - top - bottom];
  const above = (pixels) => ({ y: 1 + pixels / outer, yref: "paper" });
  const layout = {
    height,
    margin: { l: left, r: right, t: top, b: bottom },
    annotations: [{
      text: METRICS[metric], showarrow: false, x: 0, xref: "paper", xanchor: "left", yanchor: "bottom", ...above(58),
    }],
    coloraxis: {
      colorscale: scaleOf(SCALES[metric]),
      colorbar: {
        orientation: "h", thickness: 10, len: Math.min(320, inner), lenmode: "pixels", x: 0, xref: "paper", xpad: 0,
        xanchor: "left", yanchor: "top", ypad: 0, outlinewidth: 0, nticks: 5, ...above(56),
      },
    },
  };
  const at = new Map(rows.names.map((name, index) => [name, index]));
  const [layer, block, projection, head, value] =
    ["layer", "block", "projection", "head", metric].map((name) => heads.column(name));
  const matrices = Object.fromEntries(projections.map((name) => [name, rows.names.map(() => [])]));
  for (const row of range(heads.length)) {
    const line = matrices[projection[row]][at.get(rows.of(layer[row], block?.[row]))];
    while (line.length < head[row]) line.push(null);
    line[head[row]] = value[row];
  }
  const traces = projections.map((name, index) => {
    const [column, line] = [index % panels, Math.floor(index / panels)];
    const suffix = index ? index + 1 : "";
    const count = largest(matrices[name].map((cells) => cells.length));
    const start = (column * (wide + across)) / inner;
    const end = 1 - (line * (tall + between)) / outer;
    const gap = wide / count > 7 && tall / rows.names.length > 7 ? 1 : 0;
    layout[`xaxis${suffix}`] = axis(theme, line === lines - 1 ? "head" : "", {
      domain: [start, start + wide / inner], anchor: `y${suffix}`, showgrid: false, zeroline: false,
      ...wholeTicks(count), automargin: false,
    });
    layout[`yaxis${suffix}`] = axis(theme, column ? "" : "layer", {
      domain: [end - tall / outer, end], anchor: `x${suffix}`, range: [...rows.ends].reverse(), ...rows.type,
      showgrid: false, zeroline: false, automargin: rows.type.type === "category" && !column,
      ...(rows.type.type === "linear" ? wholeTicks(rows.names.length) : {}),
      showticklabels: !column,
    });
    layout.annotations.push({
      text: `<b>${plain(name.toUpperCase())}</b>  ${PROJECTIONS[name] ?? ""}, ${count} heads`, showarrow: false,
      xref: "paper", yref: "paper", x: start, y: end, xanchor: "left", yanchor: "bottom", font: { size: 12 },
    });
    return {
      type: "heatmap", x: range(count), y: rows.names, z: matrices[name], coloraxis: "coloraxis",
      xaxis: `x${suffix}`, yaxis: `y${suffix}`, xgap: gap, ygap: gap, hoverongaps: false,
      hovertemplate: `layer %{y}, ${plain(name.toUpperCase())} head %{x}<br>` +
        `${METRICS[metric].split(/[:‖]/)[0]} %{z:.4f}<extra></extra>`,
    };
  });
  return { traces, layout };
}

function layerPlot(theme, title, more) {
  const rows = layerAxis();
  const layers = tables.layers.column("layer");
  const x = tables.layers.column("block").map((block, index) => rows.of(layers[index], block));
  const ticks = rows.type.type === "linear" ? wholeTicks(rows.names.length) : {};
  const layout = {
    height: 300,
    xaxis: axis(theme, "layer", { ...rows.type, range: rows.ends, showgrid: false, zeroline: false, ...ticks }),
    yaxis: axis(theme, title, { rangemode: "tozero" }),
    bargap: rows.names.length > 60 ? 0 : 0.25,
    barmode: "overlay",
    showlegend: rows.missing.length > 0,
    legend: legendAbove(),
    ...more,
  };
  const hatched = (height, more = {}) => (rows.missing.length ? [{
    type: "bar", name: "not finished", x: rows.missing, y: rows.missing.map(() => height),
    marker: { color: "rgba(0,0,0,0)", pattern: { shape: "/", fgcolor: theme.faint, size: 7 } },
    hovertemplate: "layer %{x} is not finished<extra></extra>", ...more,
  }] : []);
  return { x, layout, rows, hatched };
}

function drawErrors(width, theme) {
  const { x, layout, hatched } = layerPlot(theme, "relative error");
  const y = tables.layers.column("relative_error");
  const hovertemplate = "layer %{x}: %{y:.4f}<extra></extra>";
  const traces = [{ type: "bar", x, y, marker: { color: theme.accent }, hovertemplate, showlegend: false }];
  traces.push(...hatched(largest(y)));
  if (page.relative_error !== null) {
    layout.shapes = [{
      type: "line", xref: "paper", x0: 0, x1: 1, y0: page.relative_error, y1: page.relative_error,
      line: { color: theme.text, width: 1, dash: "dot" },
    }];
    layout.annotations = [{
      xref: "paper", x: 1, y: page.relative_error, xanchor: "right", yanchor: "bottom", showarrow: false,
      text: `${page.missing.length ? "finished" : "all"} layers ${page.relative_error.toFixed(4)}`, bgcolor: theme.surface, borderpad: 2,
    }];
  }
  return { traces, layout };
}

function drawBytes(width, theme) {
  const dense = tables.layers.column("dense_bytes");
  const [unit, scale] = byteUnit(largest(dense));
  const { x, layout, rows, hatched } = layerPlot(theme, unit, { showlegend: true });
  const hovertemplate = `layer %{x}: %{y:.4~f} ${unit}<extra>%{fullData.name}</extra>`;
  const scaled = (name) => tables.layers.column(name).map((bytes) => bytes / scale);
  const traces = [
    { type: "bar", name: "dense", x, y: scaled("dense_bytes"), marker: { color: theme.faint }, hovertemplate },
    { type: "bar", name: "stored", x, y: scaled("stored_bytes"), marker: { color: theme.accent }, hovertemplate },
    {
      type: "scatter", name: "budget", x, y: scaled("byte_budget"), mode: "markers", hovertemplate,
      marker: { symbol: "line-ew", size: clamp(width / rows.names.length / 2, 4, 22), line: { width: 2, color: theme.second } },
    },
    ...hatched(largest(dense) / scale),
  ];
  return { traces, layout };
}

function drawRanks(width, theme) {
  const names = ["R1", "R2", "R3"].filter((name) => tables.layers.column(name).some((rank) => rank !== null));
  const { x, layout, rows, hatched } = layerPlot(theme, "", { height: 60 + 130 * names.length });
  const at = new Map(x.map((name, index) => [name, index]));
  const titles = { R1: "R1, of the width", R2: "R2, of the heads", R3: "R3, of Q, K, V, O" };
  const traces = names.flatMap((name, index) => {
    const suffix = index ? index + 1 : "";
    const ranks = tables.layers.column(name);
    const [start, end] = [1 - (index + 1) / names.length, 1 - index / names.length];
    const domain = [start + (index < names.length - 1 ? 0.06 : 0), end - (index ? 0.06 : 0)];
    layout[`yaxis${suffix}`] = axis(theme, titles[name], { rangemode: "tozero", domain, tickformat: "d", nticks: 4 });
    return [{
      type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", line: { shape: "hvh", color: theme.accent },
      x: rows.names, y: rows.names.map((layer) => (at.has(layer) ? ranks[at.get(layer)] : null)), showlegend: false,
      yaxis: `y${suffix}`, hovertemplate: `layer %{x}: ${name} = %{y}<extra></extra>`,
    }, ...hatched(largest(ranks), { yaxis: `y${suffix}`, showlegend: index === 0 })];
  });
  layout.xaxis.anchor = `y${names.length > 1 ? names.length : ""}`;
  return { traces, layout };
}

function drawSpectra(width, theme) {
  const spectra = tables.spectra;
  const wanted = Number(choice("spectra-mode"));
  const only = choice("spectra-layer");
  const [task, mode, index, value] =
    ["row", "mode", "index", "singular_value"].map((name) => spectra.column(name));
  const lines = new Map();
  for (const at of range(spectra.length)) {
    if (mode[at] !== wanted || (only !== "all" && String(task[at]) !== only)) continue;
    if (!lines.has(task[at])) lines.set(task[at], [[], []]);
    const [x, y] = lines.get(task[at]);
    x.push(index[at]);
    y.push(value[at] > 0 ? value[at] : null); // A logarithm has no zero.
  }
  const [layers, groups, ranks] = ["layer", "block", `R${wanted}`].map((name) => tables.layers.column(name));
  const most = Math.max(largest(layers), 1);
  // The end of the scale that the background swallows is left out.
  const colors = range(9).map((step) => colorAt(SCALES.density, theme.dark ? 0.25 + (step / 8) * 0.75 : (step / 8) * 0.85));
  const traces = [...lines].map(([row, [x, y]]) => ({
    type: "scatter", mode: "lines", x, y, showlegend: false,
    line: { width: lines.size > 40 ? 1 : 1.6, color: colorAt(colors, layers[row] / most) },
    hovertemplate: `layer ${layers[row]}, ${plain(groups[row])}<br>singular value %{x}: %{y:.4~g}<extra></extra>`,
  }));
  const kept = [...lines].filter(([row]) => ranks[row] !== null).map(([row, [x, y]]) => {
    const place = x.findIndex((one) => one >= ranks[row]);
    return { row, x: x[place], y: y[place] };
  });
  traces.push({
    type: "scatter", mode: "markers", x: kept.map((one) => one.x), y: kept.map((one) => one.y), showlegend: false,
    text: kept.map((one) => `layer ${layers[one.row]}: rank R${wanted} = ${ranks[one.row]}`),
    hovertemplate: "%{text}<extra></extra>",
    marker: {
      size: lines.size > 40 ? 4 : 7, color: kept.map((one) => layers[one.row]), cmin: 0, cmax: most, colorscale: scaleOf(colors),
      line: { width: lines.size > 40 ? 0 : 1, color: theme.surface }, showscale: only === "all" && lines.size > 1,
      colorbar: { title: { text: "layer", side: "right" }, thickness: 10, outlinewidth: 0, tickformat: "d", nticks: 5 },
    },
  });
  const layout = {
    height: 380,
    xaxis: axis(theme, `index of the singular value, mode ${wanted}`, { rangemode: "tozero", zeroline: false }),
    yaxis: axis(theme, "singular value (log scale)", { type: "log", ...logTicks([...lines.values()].flatMap(([, y]) => y)) }),
  };
  return { traces, layout };
}

// Several ticks at round values, however small the part of a decade that is shown.
function logTicks(values) {
  const known = values.filter((value) => value > 0);
  const [least, most] = [known.reduce((a, b) => Math.min(a, b), Infinity), largest(known)];
  if (!known.length || least === most) return {};
  const decades = range(Math.ceil(Math.log10(most)) - Math.floor(Math.log10(least)) + 1)
    .map((step) => Math.floor(Math.log10(least)) + step);
  const inside = (steps) => decades.flatMap((decade) => steps.map((step) => Number(`${step}e${decade}`)))
    .filter((value) => value >= least * 0.9 && value <= most * 1.1);
  const choices = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], range(36).map((step) => 1 + step / 4), range(180).map((step) => (20 + step) / 20)];
  const tickvals = choices.map(inside).find((ticks) => ticks.length >= 4) ?? [least, most];
  return { tickmode: "array", tickvals, ticktext: tickvals.map((value) => shown(value)) };
}

function drawTimeline(width, theme) {
  const tasks = tables.timeline;
  const lost = tables.lost;
  const time = (table, name) => table.column(name).map((text) => (text ? Date.parse(text) / 1000 : null));
  const [read, computed, written, ended] =
    ["read_at", "computed_at", "written_at", "ended_at"].map((name) => time(tasks, name));
  const [lostStart, lostEnd] = [time(lost, "started_at"), time(lost, "time")];
  const calls = time(tables.calls, "started_at");
  const call = choice("timeline-call") ?? "all";
  const [from, to] = call === "all" ? [-Infinity, Infinity] : [calls[call], calls[Number(call) + 1] ?? Infinity];
  const inside = (at) => at >= from - 1e-3 && at < to;
  const chosen = range(tasks.length).filter((index) => inside(read[index]));
  const gone = range(lost.length).filter((index) => inside(lostEnd[index]));
  const first = new Map();
  const workerOf = (table, index) => table.column("worker")[index] || null;
  const begins = (worker, at) => first.set(worker, Math.min(first.get(worker) ?? Infinity, at));
  for (const index of chosen) begins(workerOf(tasks, index), read[index]);
  for (const index of gone) begins(workerOf(lost, index), lostStart[index] ?? lostEnd[index]);
  const workers = [...first.keys()].sort((a, b) => (a === null) - (b === null) || first.get(a) - first.get(b));
  const place = new Map(workers.map((name, index) => [name, index]));
  const row = (table, index) => place.get(workerOf(table, index));
  const moments = [...chosen.map((i) => read[i]), ...gone.map((i) => lostStart[i] ?? lostEnd[i])];
  const origin = moments.reduce((least, at) => Math.min(least, at), Infinity);
  const last = [...chosen.map((i) => ended[i]), ...gone.map((i) => lostEnd[i])].reduce((a, b) => Math.max(a, b), origin);
  const [unit] = timeUnit(last - origin);
  const scale = seconds[unit];
  const spot = (at) => (at - origin) / scale;
  const [kind, layer, block, attempt] = ["kind", "layer", "block", "attempt"].map((name) => tasks.column(name));
  const begun = { read, write: written };
  const running = new Map(chosen.map((index) => [index, computed[index]]));
  const traces = Object.entries(STAGES).map(([stage, [name, color]]) => {
    const took = tasks.column(`seconds_${stage}`);
    const thin = stage in begun;
    const base = chosen.map((index) => spot(begun[stage]?.[index] ?? running.get(index)));
    if (!thin) for (const index of chosen) running.set(index, running.get(index) + took[index]);
    const shift = { read: -0.37, write: 0.37 }[stage] ?? 0;
    return {
      type: "bar", orientation: "h", name, base, x: chosen.map((index) => took[index] / scale),
      y: chosen.map((index) => row(tasks, index) + shift), width: thin ? 0.14 : 0.56,
      marker: {
        color, line: { width: 0 },
        pattern: { shape: chosen.map((index) => (kind[index] === "curves" ? "/" : "")), fillmode: "overlay", fgcolor: theme.surface, size: 5 },
      },
      text: chosen.map((index) => `layer ${layer[index]}, ${plain(block[index])}${kind[index] === "curves" ? ", curve" : ""}` +
        `<br>attempt ${attempt[index] ?? "unknown"}<br>${name}: ${shown(took[index])} s`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    };
  });
  if (gone.length) {
    const told = (index) => {
      const of = (name) => lost.column(name)[index];
      const message = plain(of("message")).replace(/(.{60}\S*)\s/g, "$1<br>");
      return `layer ${of("layer") ?? "unknown"}, attempt ${of("attempt")} ${plain(of("kind"))}: ${plain(of("error_type"))}<br>${message}`;
    };
    const text = gone.map(told);
    const y = gone.map((index) => row(lost, index));
    traces.push({
      type: "bar", orientation: "h", name: "lost attempt", y, width: 0.56, text, textposition: "none",
      base: gone.map((index) => spot(lostStart[index] ?? lostEnd[index])),
      x: gone.map((index) => (lostEnd[index] - (lostStart[index] ?? lostEnd[index])) / scale),
      marker: { color: theme.faint, line: { width: 1, color: theme.bad }, pattern: { shape: "/", fgcolor: theme.bad, size: 6 } },
      hovertemplate: "%{text}<extra></extra>",
    });
    traces.push({
      type: "scatter", mode: "markers", name: "retry or failure", y, text, hovertemplate: "%{text}<extra></extra>",
      x: gone.map((index) => spot(lostEnd[index])),
      marker: {
        symbol: gone.map((index) => (lost.column("kind")[index] === "failed" ? "x" : "cross")), size: 10, color: theme.bad,
        line: { width: 1, color: theme.surface },
      },
    });
  }
  const label = (name) => {
    if (name === null) return "unknown";
    return plain(width < 600 && name.length > 12 ? `…${name.slice(-11)}` : name);
  };
  const every = Math.ceil(workers.length / 60);
  const ticks = range(workers.length).filter((index) => index % every === 0);
  const layout = {
    height: clamp(workers.length * 34, 60, 900) + 80,
    barmode: "overlay",
    showlegend: false,
    xaxis: axis(theme, `${width < 600 ? "time" : `time since the first start${call === "all" ? "" : " of this call"}`} (${unit})`, { rangemode: "tozero" }),
    yaxis: axis(theme, "", {
      tickvals: ticks, ticktext: ticks.map((index) => label(workers[index])), zeroline: false, showgrid: false,
      range: [workers.length - 0.4, -0.6],
    }),
  };
  return { traces, layout };
}

function drawStages(width, theme) {
  const names = tables.stages.column("stage").slice().reverse();
  const took = tables.stages.column("seconds").slice().reverse();
  const [unit] = timeUnit(largest(took));
  const total = took.reduce((sum, one) => sum + one, 0);
  const traces = [{
    type: "bar", orientation: "h", x: took.map((one) => one / seconds[unit]), y: names.map((name) => STAGES[name][0]),
    marker: { color: names.map((name) => STAGES[name][1]) }, textposition: "auto", cliponaxis: false,
    text: took.map((one) => `${((100 * one) / total).toFixed(0)} %`), hovertemplate: `%{y}: %{x:.4~g} ${unit}<extra></extra>`,
  }];
  return { traces, layout: { height: 250, xaxis: axis(theme, `worker time (${unit})`), yaxis: axis(theme, "") } };
}

const legendAbove = () => ({ orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left" });

const DRAW = {
  heads: drawHeads, errors: drawErrors, bytes: drawBytes, ranks: drawRanks, spectra: drawSpectra,
  timeline: drawTimeline, stages: drawStages,
};
