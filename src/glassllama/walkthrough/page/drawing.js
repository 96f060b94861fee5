// Small pieces that all pictures are made of. Texts only ever become text nodes, never markup.

const documentData = JSON.parse(document.getElementById('document').textContent);
const { walk, ends } = documentData;
const config = walk.config;
const T = walk.tokens.length;
const piece = (t) => walk.tokens[t].piece;

// What the reader looks at. `layer` has its full tensors here only if walk.layers holds it.
const state = {
  step: documentData.start,
  token: T - 1,
  layer: walk.layer,
  head: walk.head,
  pair: 0,
  temperature: 1,
  topK: 0,
  topP: 1,
  made: 0,
};

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

const el = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);

// Four digits, as the numbers came: 0.07725, -12.35, 1.4e-5.
function exact(value) {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (value === 0 || (size >= 0.001 && size < 1e5)) return String(+value.toPrecision(4));
  return value.toExponential(3);
}

const percent = (p) =>
  p >= 0.001 || p === 0 ? `${(100 * p).toFixed(1)}%` : `${(100 * p).toPrecision(2)}%`;
const whole = (n) => n.toLocaleString('en');

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const channels = (name) => css(name).split(/\s+/).map(Number);

// -1 … 1 -> [r, g, b]: cold below zero, warm above, paper at zero.
function palette() {
  const [zero, plus, minus] = ['--zero', '--plus', '--minus'].map(channels);
  return (x) => {
    const end = x < 0 ? minus : plus;
    const part = Math.min(Math.abs(x), 1);
    return zero.map((from, i) => Math.round(from + (end[i] - from) * part));
  };
}

// How bright a colour [r, g, b] looks, 0 … 1: relative luminance as WCAG 2 defines it.
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) =>
    c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Give a node a background [r, g, b], and black or white text: whichever has more contrast.
function tinted(node, rgb) {
  const light = luminance(rgb);
  node.style.backgroundColor = `rgb(${rgb.join(' ')})`;
  node.style.color = (light + 0.05) ** 2 > 1.05 * 0.05 ? '#000' : '#fff';
  node.classList.add('tinted');
}

// items: {name, value, text, out}. Longest bar: `longest`, or the largest value.
function bars(label, items, longest) {
  const top = longest ?? Math.max(...items.map((item) => Math.abs(item.value)), 1e-30);
  const list = el('div', { class: 'bars', role: 'list', 'aria-label': label });
  for (const { name, value, text, out } of items) {
    const bar = el('span', { class: 'fill' });
    bar.style.width = `${Math.min((100 * Math.abs(value)) / top, 100)}%`;
    list.append(
      el(
        'div',
        { class: out ? 'row out' : 'row', role: 'listitem' },
        el('span', { class: 'name mono' }, name),
        el('span', { class: 'track', 'aria-hidden': 'true' }, bar),
        el('span', { class: 'number' }, text ?? exact(value)),
      ),
    );
    if (out) for (const cell of list.lastChild.children) cell.classList.add('out');
  }
  return list;
}

function slider(name, { min, max, step = 1, value, show = String }, changed) {
  const shown = el('output', {}, show(value));
  const input = el('input', {
    type: 'range',
    min,
    max,
    step,
    value,
    'data-slider': name,
    'aria-valuetext': show(value),
  });
  input.addEventListener('input', () => {
    const now = Number(input.value);
    shown.textContent = show(now);
    input.setAttribute('aria-valuetext', show(now));
    changed(now);
  });
  return el('label', { class: 'slider' }, el('span', {}, name), input, shown);
}

function choice(name, options, value, changed) {
  const select = el(
    'select',
    { onchange: (event) => changed(event.target.value) },
    options.map(([key, text]) =>
      el('option', { value: key, selected: String(key) === String(value) ? '' : null }, text),
    ),
  );
  return el('label', {}, el('span', {}, name), select);
}

const picture = (...children) => el('div', { class: 'picture' }, ...children);
const caption = (text) => el('p', { class: 'caption' }, text);
const heading = (text) => el('h3', {}, text);
const controls = (...children) => el('div', { class: 'controls' }, ...children);

function table(head, rows) {
  const titles = head.some(Boolean)
    ? el(
        'thead',
        {},
        el(
          'tr',
          {},
          head.map((name) => el('th', { scope: 'col' }, name)),
        ),
      )
    : null;
  return el(
    'table',
    {},
    titles,
    el(
      'tbody',
      {},
      rows.map((row) =>
        el(
          'tr',
          {},
          row.map((cell) =>
            el(
              'td',
              { class: typeof cell === 'number' ? 'number' : null },
              typeof cell === 'number' ? exact(cell) : cell,
            ),
          ),
        ),
      ),
    ),
  );
}
