// The parts that all views are made of: elements, numbers, bars, sliders, tables, heat maps.
// Texts of the document become text nodes, never markup.
const { walk, outside, start } = JSON.parse(document.getElementById('document').textContent);
const config = walk.config;
const T = walk.tokens.length;
const piece = (t) => walk.tokens[t].piece;
const range = (n) => [...Array(n).keys()];
const clamp = (x, low, high) => Math.max(low, Math.min(x, high));
const byId = (id) => document.getElementById(id);

// What is shown. All tensors of `layer` are in this file only if walk.layers has it.
const state = {
  step: start, token: T - 1, layer: walk.layer, head: walk.head, pair: 0,
  temperature: 1, topK: 0, topP: 1, generated: 0,
};

// 'div.picture.lens': a tag with classes. Attributes that are null or false are left out.
function create(namespace, tag, attributes, children) {
  const [name, ...classes] = tag.split('.');
  const node = document.createElementNS(namespace, name);
  if (classes.length) node.setAttribute('class', classes.join(' '));
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if ((value ?? false) !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(3).filter((child) => (child ?? null) !== null));
  return node;
}

const HTML = document.documentElement.namespaceURI;
const SVG = 'http://www.w3.org/2000/svg';
const el = (tag, attributes, ...children) => create(HTML, tag, attributes, children);
const svg = (tag, attributes, ...children) => create(SVG, tag, attributes, children);
const button = (tag, attributes, ...children) =>
  el(tag, { type: 'button', ...attributes }, ...children);
const [picture, controls, cells] = ['picture', 'controls', 'cells'].map((name) =>
  (...children) => el(`div.${name}`, {}, ...children));
const [caption, note, heading] = ['p.caption', 'p.note', 'h3'].map((tag) =>
  (text) => el(tag, {}, text));

// Four significant digits: 0.07725, -12.35, 1.4e-5.
function exact(value) {
  if ((value ?? null) === null) return '–';
  const size = Math.abs(value);
  if (value === 0 || (size >= 0.001 && size < 1e5)) return String(+value.toPrecision(4));
  return value.toExponential(3);
}

const percent = (p) =>
  p >= 0.001 || p === 0 ? `${(100 * p).toFixed(1)}%` : `${(100 * p).toPrecision(2)}%`;
const whole = (n) => n.toLocaleString('en');

// -1 … 1 -> [r, g, b], from --minus over --zero to --plus of the style sheet.
function palette() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim().split(/\s+/).map(Number);
  const [zero, plus, minus] = ['--zero', '--plus', '--minus'].map(color);
  return (x) => {
    const [end, share] = [x < 0 ? minus : plus, Math.min(Math.abs(x), 1)];
    return zero.map((from, i) => Math.round(from + (end[i] - from) * share));
  };
}

// Relative luminance of a color [r, g, b], 0 … 1, as WCAG 2 defines it.
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) =>
    c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Give a node a background [r, g, b], and black or white text: whichever has more contrast.
function tint(node, rgb) {
  node.style.backgroundColor = `rgb(${rgb.join(' ')})`;
  node.style.color = (luminance(rgb) + 0.05) ** 2 > 1.05 * 0.05 ? '#000' : '#fff';
  node.classList.add('tinted');
}

// items: {name, value, text, out}. The longest bar is `longest`, or the largest value.
function bars(label, items, longest) {
  const top = longest ?? Math.max(...items.map((item) => Math.abs(item.value)), 1e-30);
  const rows = items.map(({ name, value, text, out }) => {
    const [bar, mark] = [el('span.fill'), out ? '.out' : ''];
    bar.style.width = `${Math.min((100 * Math.abs(value)) / top, 100)}%`;
    return el(`div.row${mark}`, { role: 'listitem' },
      el(`span.name.mono${mark}`, {}, name),
      el(`span.track${mark}`, { 'aria-hidden': 'true' }, bar),
      el(`span.number${mark}`, {}, text ?? exact(value)));
  });
  return el('div.bars', { role: 'list', 'aria-label': label }, rows);
}

// A picture with a bar for each [name, value]; `show` writes the value.
const barPicture = (label, pairs, show, longest) =>
  picture(bars(label, pairs.map(([name, value]) => ({ name, value, text: show(value) })), longest));

const probabilityBars = (label, names, probabilities) =>
  barPicture(label, names.map((name, i) => [name, probabilities[i]]), percent, 1);

function slider(name, { min = 0, max, step = 1, value, show = String }, changed) {
  const output = el('output', {}, show(value));
  const input = el('input', {
    type: 'range', min, max, step, value, 'data-slider': name, 'aria-valuetext': show(value),
    oninput: () => {
      const now = Number(input.value);
      output.textContent = show(now);
      input.setAttribute('aria-valuetext', show(now));
      changed(now);
    },
  });
  return el('label.slider', {}, el('span', {}, name), input, output);
}

const table = (head, rows) =>
  el('table', {},
    head ? el('thead', {}, el('tr', {}, head.map((name) => el('th', { scope: 'col' }, name)))) : null,
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((cell) =>
      typeof cell === 'number' ? el('td.number', {}, exact(cell)) : el('td', {}, cell))))));

// {rows, columns, at(row, column)} of a flat tensor (rows, columns) or (heads, rows, columns).
function matrix({ shape, values }, head = 0) {
  const [rows, columns] = shape.slice(-2);
  const first = shape.length === 3 ? head * rows * columns : 0;
  return { rows, columns, at: (r, c) => values[first + r * columns + c] };
}

// The same for attention weights, of which the file has the lower triangle. null: hidden, by the
// causal mask or by a sliding window.
const triangle = (flat, window) => ({
  rows: T, columns: T,
  at: (r, c) => (c > r || (window && c <= r - window) ? null : flat[(r * (r + 1)) / 2 + c]),
});

// The size at which colors end: all but the largest percent, so that one outlier does not make all
// others pale. `signed`: there are negative numbers.
function scaleOf({ rows, columns, at }) {
  const numbers = Float64Array.from({ length: rows * columns }, (_, i) =>
    at(Math.floor(i / columns), i % columns) ?? 0);
  const sizes = numbers.map(Math.abs).sort();
  const top = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1;
  return { top, signed: numbers.some((value) => value < 0) };
}

// Of the columns that share a pixel the one with the largest size is drawn.
function largest(data, r, from, to) {
  let best = data.at(r, from);
  for (let c = from + 1; c < to; c++)
    if (Math.abs(data.at(r, c)) > Math.abs(best)) best = data.at(r, c);
  return best;
}

const SHADES = 256; // on either side of zero
const MASKED = 0x28808080; // pale gray

// All colors of a picture as pixels, whose bytes from low to high are red, green, blue, opacity.
function pixelColors() {
  const color = palette();
  return Uint32Array.from({ length: 2 * SHADES + 1 }, (_, i) => {
    const [r, g, b] = color(i / SHADES - 1);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
}

function paint(canvas, data, limit, maxWidth = data.columns) {
  canvas.width = Math.min(maxWidth, data.columns);
  canvas.height = data.rows;
  const context = canvas.getContext('2d');
  const image = context.createImageData(canvas.width, canvas.height);
  const [pixels, colors] = [new Uint32Array(image.data.buffer), pixelColors()];
  const share = data.columns / canvas.width;
  for (let r = 0, i = 0; r < data.rows; r++) {
    for (let x = 0; x < canvas.width; x++, i++) {
      const first = Math.floor(x * share);
      const value = largest(data, r, first, Math.max(Math.floor((x + 1) * share), first + 1));
      pixels[i] =
        value === null ? MASKED : colors[Math.round(SHADES * (1 + clamp(value / limit, -1, 1)))];
    }
  }
  context.putImageData(image, 0, 0);
}

// Heat maps far below the window are drawn when they come near it, so that a click is fast.
const pending = new WeakMap();
const observer = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    observer.unobserve(target);
    pending.get(target)();
  }
}, { rootMargin: '400px' });

const MOVES = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  PageUp: [0, -16], PageDown: [0, 16],
};
const WIDE = 480; // pixels

// A matrix as colors; the number under the pointer, or where the arrow keys are, is written below.
function heatmap(
  name, data,
  { column = 0, rowName = piece, columnName = (c) => `channel ${c}`, limit } = {},
) {
  let top = limit; // without a limit it is computed when the map is drawn
  const width = byId('step').clientWidth;
  const side = width < WIDE ? 2 : 4; // numbers written on either side
  const at = { row: Math.min(state.token, data.rows - 1), column: Math.min(column, data.columns - 1) };
  const value = el('output.value.mono', { 'aria-live': 'polite' });
  const near = el('div.near.mono', { 'aria-hidden': 'true' });

  function show(r, c) {
    [at.row, at.column] = [clamp(r, 0, data.rows - 1), clamp(c, 0, data.columns - 1)];
    const number = data.at(at.row, at.column);
    const text = number === null ? 'masked' : exact(number);
    value.textContent = `${rowName(at.row)} · ${columnName(at.column)}: ${text}`;
    const count = Math.min(2 * side + 1, data.columns);
    const first = clamp(at.column - side, 0, data.columns - count);
    const color = palette();
    near.replaceChildren(...range(count).map((i) => {
      const x = data.at(at.row, first + i);
      const cell = el(first + i === at.column ? 'span.here' : 'span', {}, exact(x));
      if (x !== null) tint(cell, color((0.35 * x) / top));
      return cell;
    }));
  }

  function follow(event) {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientY - box.top) / box.height) * data.rows),
      Math.floor(((event.clientX - box.left) / box.width) * data.columns));
  }

  const canvas = el('canvas', {
    tabindex: 0, role: 'application', 'aria-roledescription': 'heat map', 'data-map': name,
    'aria-label': `${name}, ${data.rows} × ${data.columns}; arrow keys read single numbers`,
    onpointermove: follow, onpointerdown: follow,
    onkeydown: (event) => {
      const move = MOVES[event.key];
      if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation();
      show(at.row + move[0], at.column + move[1]);
    },
  });
  const rowHeight = clamp(Math.round(300 / data.rows), 14, 28);
  canvas.style.height = `${rowHeight * data.rows}px`;
  canvas.style.imageRendering = 'pixelated';
  const names = el('div.rows.mono', { 'aria-hidden': 'true' },
    range(data.rows).map((r) => el(r === state.token ? 'span.chosen' : 'span', {}, rowName(r))));
  names.style.setProperty('--row', `${rowHeight}px`);
  const shown = picture(el('div.heat', {}, names, canvas), value, near);
  pending.set(shown, () => {
    const scale = limit ? { top: limit, signed: false } : scaleOf(data);
    top = scale.top;
    show(at.row, at.column);
    paint(canvas, data, top, Math.max(Math.floor(width * devicePixelRatio), 64));
    shown.append(el('div.legend', { 'aria-hidden': 'true' },
      scale.signed ? exact(-top) : '0', el(scale.signed ? 'i' : 'i.up'),
      limit ? exact(top) : `${exact(top)} and more`));
  });
  observer.observe(shown);
  return shown;
}

// A tensor by the name of its hook, with a title; of a tensor with heads, the given one.
const titledMap = (hook, title, tensor, head) => [
  heading(title),
  caption(`${hook}: ${tensor.shape.join(' × ')}`),
  heatmap(hook, matrix(tensor, head)),
];
const outsideMap = (hook, title) => outside[hook] ? titledMap(hook, title, outside[hook]) : [];

// Tensors of the chosen layer, if it has them, one below the other; or a note why they are not in
// the file.
function tensors(titles) {
  const layer = walk.layers[state.layer];
  if (!layer) return [missingLayer()];
  return Object.entries(titles).filter(([hook]) => hook in layer).map(([hook, title]) => {
    const tensor = layer[hook];
    const heads = tensor.shape.length === 3 ? tensor.shape[0] : 0;
    const shared = heads === config.n_kv_heads && heads !== config.n_heads;
    const head = shared ? Math.floor(state.head / config.group_size) : state.head;
    const which = heads ? `, ${shared ? 'KV head' : 'head'} ${head}` : '';
    return el('section', {}, titledMap(hook, title + which, tensor, head));
  });
}

const missingLayer = () =>
  note(`The full tensors of layer ${state.layer} are not in this file; those of layer ${
    Object.keys(walk.layers).join(', ')
  } are. Create it again with --layers ${state.layer} or --layers all.`);
