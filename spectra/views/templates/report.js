// Tables sort; figures show values, hide curves and zoom. Texts come from the page and are set as text, never as markup.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
for (const figure of document.querySelectorAll("figure[data-figure]")) makeInteractive(figure);

// A click on a heading sorts by it, a second one in the other direction. Cells without a number stay last.
function makeSortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [row, row.cells[column].dataset.order, row.cells[column].textContent.trim()]);
      const numeric = rows.some(([, order]) => order !== undefined);
      rows.sort(([, a, atext], [, b, btext]) => {
        if (numeric && (a === undefined || b === undefined)) return (a === undefined) - (b === undefined);
        return (down ? -1 : 1) * (numeric ? a - b : atext.localeCompare(btext, undefined, { numeric: true }));
      });
      body.append(...rows.map(([row]) => row));
    });
  });
}

function makeInteractive(figure) {
  const panels = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
  const svg = figure.querySelector("svg");
  const hidden = new Set();
  const tip = figure.appendChild(element("div", { class: "tip", hidden: "" }));
  const reset = figure.querySelector(".reset");
  const full = { x: [0, 1], y: [0, 1] };
  let window_ = full; // the part of every panel that is seen, as parts of its width and height
  for (const panel of panels) preparePanel(panel);

  for (const entry of svg.querySelectorAll(".entry")) {
    entry.setAttribute("role", "button");
    entry.setAttribute("tabindex", "0");
    entry.addEventListener("click", () => toggle(entry.dataset.series));
    entry.addEventListener("keydown", (event) => event.key === "Enter" && toggle(entry.dataset.series));
  }
  reset.addEventListener("click", () => zoom(full));
  figure.querySelector(".enlarge").addEventListener("click", () => figure.classList.toggle("large"));

  function toggle(series) {
    hidden.has(series) ? hidden.delete(series) : hidden.add(series);
    for (const part of svg.querySelectorAll(`[data-series="${series}"]`)) {
      part.classList.toggle("off", hidden.has(series));
    }
  }

  // The curves of a panel move as one group behind one clip, so that zooming is one transform.
  function preparePanel(panel) {
    const group = svg.querySelector(`[data-panel="${panel.panel}"]`);
    const [left, top, width, height] = panel.box;
    const clip = svgElement("clipPath", { id: `${figure.dataset.figure}-clip-${panel.panel}` });
    clip.append(svgElement("rect", { x: left, y: top, width, height }));
    const frame = svgElement("g", { "clip-path": `url(#${clip.id})` });
    panel.content = svgElement("g", { class: "content" });
    const curves = [...group.children].filter((child) => child.matches(".series") || /Collection|line2d/.test(child.id));
    curves[0].before(frame);
    frame.append(clip, panel.content);
    panel.content.append(...curves);
    panel.ticks = group.appendChild(svgElement("g", { class: "zoomed-ticks" }));
    panel.marker = group.appendChild(svgElement("line", { class: "marker", y1: top, y2: top + height, visibility: "hidden" }));
    panel.brush = group.appendChild(svgElement("rect", { class: "brush", visibility: "hidden" }));
    const cover = group.appendChild(svgElement("rect", { class: "cover", x: left, y: top, width, height }));
    for (const legend of group.querySelectorAll("[id*='legend']")) group.append(legend);
    let start = null;
    cover.addEventListener("pointermove", (event) => {
      const place = within(panel, event);
      if (start) drawBrush(panel, start, place);
      else show(panel, place, event);
    });
    cover.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch") return show(panel, within(panel, event), event);
      start = within(panel, event);
      cover.setPointerCapture(event.pointerId);
    });
    cover.addEventListener("pointerup", (event) => {
      panel.brush.setAttribute("visibility", "hidden");
      if (start) select(start, within(panel, event));
      start = null;
    });
    cover.addEventListener("pointerleave", hide);
    cover.addEventListener("dblclick", () => zoom(full));
  }

  // Where the pointer is in a panel, as parts of its width and height as they are seen, from the bottom left.
  function within(panel, event) {
    const [left, top, width, height] = panel.box;
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const part = (value) => Math.min(Math.max(value, 0), 1);
    return [part((point.x - left) / width), part(1 - (point.y - top) / height)];
  }

  function drawBrush(panel, [x0, y0], [x1, y1]) {
    const [left, top, width, height] = panel.box;
    set(panel.brush, {
      x: left + width * Math.min(x0, x1), width: width * Math.abs(x1 - x0),
      y: top + height * (1 - Math.max(y0, y1)), height: height * Math.abs(y1 - y0), visibility: "visible",
    });
  }

  // A rectangle zooms to it; one that is flat or narrow zooms along its long side alone.
  function select([x0, y0], [x1, y1]) {
    const wide = Math.abs(x1 - x0) > 0.03, tall = Math.abs(y1 - y0) > 0.06;
    const scaled = ([low, high], a, b) => [low + (high - low) * Math.min(a, b), low + (high - low) * Math.max(a, b)];
    const canZoomY = panels.every((panel) => panel.y);
    if (wide || (tall && canZoomY)) {
      zoom({
        x: wide ? scaled(window_.x, x0, x1) : window_.x,
        y: tall && canZoomY ? scaled(window_.y, y0, y1) : window_.y,
      });
    }
  }

  function zoom(next) {
    window_ = next;
    hide();
    const zoomed = next !== full;
    reset.hidden = !zoomed;
    figure.classList.toggle("zoomed", zoomed);
    for (const panel of panels) {
      const [left, top, width, height] = panel.box;
      const a = 1 / (next.x[1] - next.x[0]), c = 1 / (next.y[1] - next.y[0]);
      const dx = left - a * (left + width * next.x[0]), dy = top - c * (top + height * (1 - next.y[1]));
      panel.content.setAttribute("transform", `translate(${dx} ${dy}) scale(${a} ${c})`);
      for (const mark of panel.content.querySelectorAll("use:not([x='0'])")) { // markers keep their size; areas stand at 0
        const x = +mark.getAttribute("x") || 0, y = +mark.getAttribute("y") || 0;
        mark.setAttribute("transform", `translate(${x} ${y}) scale(${1 / a} ${1 / c}) translate(${-x} ${-y})`);
      }
      const axes = panel.y ? ["x", "y"] : ["x"];
      for (const tick of svg.querySelectorAll(`[data-panel="${panel.panel}"] .tick`)) {
        tick.classList.toggle("off", zoomed && axes.some((axis) => tick.matches(`.${axis}-tick`)));
      }
      panel.ticks.replaceChildren();
      if (zoomed) axes.forEach((axis) => drawTicks(panel, axis, next[axis]));
    }
  }

  function drawTicks(panel, axis, [low, high]) {
    const [left, top, width, height] = panel.box;
    const labelled = svg.querySelector(`[data-panel="${panel.panel}"] .${axis}-tick text`);
    for (const [place, value] of ticks(panel[axis], low, high)) {
      const x = left + width * place, y = top + height * (1 - place);
      const ends = axis === "x" ? { x1: x, x2: x, y1: top, y2: top + height } : { x1: left, x2: left + width, y1: y, y2: y };
      panel.ticks.append(svgElement("line", ends));
      if (!labelled) continue;
      const where = axis === "x" ? { x, y: top + height + 13, "text-anchor": "middle" } : { x: left - 5, y: y + 3, "text-anchor": "end" };
      panel.ticks.append(svgElement("text", where, written(value)));
    }
  }

  function show(panel, [px], event) {
    const x = window_.x[0] + px * (window_.x[1] - window_.x[0]);
    const seen = panel.series.filter((one) => !hidden.has(String(one.series)) && one.at.length);
    if (!seen.length) return hide();
    const cells = seen[0].cells;
    const distance = (place) => Math.abs(place - x);
    const at = cells ? x : seen.flatMap((one) => one.at).reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const rows = [];
    for (const one of seen) {
      one.at.forEach((place, index) => { // two records of one training step are both shown
        const here = cells ? place <= x && x < one.at[index + 1] : Math.abs(place - at) < 1e-3;
        if (!here || !one.says[index]) return;
        const row = element("div", {}, `${one.name}: ${one.says[index]}`);
        row.style.borderColor = one.colour;
        rows.push(row);
      });
    }
    const { back } = scales(panel.x);
    const [first, last] = panel.x.ends;
    const heading = seen[0].axis + written(back(first + at * (last - first)), 3);
    tip.replaceChildren(element("strong", {}, heading), ...rows.slice(0, 16));
    tip.hidden = false;
    const box = figure.getBoundingClientRect();
    const right = event.clientX - box.left > box.width / 2;
    tip.style.left = right ? "" : `${event.clientX - box.left + 14}px`;
    tip.style.right = right ? `${box.right - event.clientX + 14}px` : "";
    tip.style.top = `${event.clientY - box.top + 14}px`;
    const place = panel.box[0] + (panel.box[2] * (at - window_.x[0])) / (window_.x[1] - window_.x[0]);
    set(panel.marker, { x1: place, x2: place, visibility: "visible" });
  }

  function hide() {
    tip.hidden = true;
    for (const panel of panels) panel.marker.setAttribute("visibility", "hidden");
  }
}

// From values to what is evenly spaced on an axis, and back.
function scales({ kind, threshold = 1, stretch = 1 }) {
  const edge = threshold * stretch;
  return {
    linear: { forward: (v) => v, back: (t) => t },
    log: { forward: Math.log10, back: (t) => 10 ** t },
    symlog: {
      forward: (v) => Math.abs(v) <= threshold ? v * stretch : Math.sign(v) * (edge + threshold * Math.log10(Math.abs(v) / threshold)),
      back: (t) => Math.abs(t) <= edge ? t / stretch : Math.sign(t) * threshold * 10 ** ((Math.abs(t) - edge) / threshold),
    },
  }[kind];
}

// Ticks of an axis between two parts of it: powers of ten where three or more are seen, else round numbers.
function ticks(scale, low, high) {
  const [first, last] = scale.ends;
  const { kind, threshold } = scale;
  const { forward, back } = scales(scale);
  const [from, to] = [low, high].map((part) => back(first + part * (last - first)));
  let values = [];
  if (kind !== "linear") {
    for (let power = -30; power <= 30; power += 1) values.push(10 ** power);
    if (kind === "symlog") values = [0, ...values.filter((v) => v >= 0.99 * threshold).flatMap((v) => [v, -v])];
    values = values.filter((v) => v >= from && v <= to).sort((a, b) => a - b);
    values = values.filter((_, index) => index % Math.ceil(values.length / 7) === 0);
  }
  if (values.length < 3) {
    const rough = (to - from) / 6, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    values = [];
    for (let k = Math.ceil(from / step); k * step <= to; k += 1) values.push(k * step);
  }
  return values.map((value) => [((forward(value) - first) / (last - first) - low) / (high - low), value]);
}

// A number in the signs of print: 0.25, 1,200, −3·10⁻⁵.
function written(value, digits = 4) {
  const number = Number(value.toPrecision(digits));
  const small = number !== 0 && Math.abs(number) < 1e-3;
  const [front, power] = (small ? number.toExponential() : number.toString()).split("e");
  const raised = power && [...String(Number(power))].map((digit) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(digit)]).join("");
  return (raised ? `${front}·10${raised}` : front).replace("-", "−").replace(/^(−?)1·/, "$1");
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function element(tag, attributes, text = "") {
  const node = set(document.createElement(tag), attributes);
  node.textContent = text;
  return node;
}

function svgElement(tag, attributes, text = "") {
  const node = set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  node.textContent = text;
  return node;
}
