// A matrix as colours, with the exact number under the pointer or under the arrow keys.

// {rows, columns, at(row, column)} of a flat tensor (rows, columns) or (heads, rows, columns).
function matrix({ shape, values }, head = 0) {
  const [rows, columns] = shape.slice(-2);
  const start = shape.length === 3 ? head * rows * columns : 0;
  return { rows, columns, at: (r, c) => values[start + r * columns + c] };
}

// The lower triangle that attention is kept as.
function lower(flat) {
  return { rows: T, columns: T, at: (r, c) => (c > r ? null : flat[(r * (r + 1)) / 2 + c]) };
}

// Where colours end: the largest but one percent, so that one outlier does not pale all others.
// `signed`: some are below zero.
function reach({ rows, columns, at }) {
  const sizes = new Float64Array(rows * columns);
  let signed = false;
  for (let r = 0, i = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++, i++) {
      const value = at(r, c) ?? 0;
      signed ||= value < 0;
      sizes[i] = Math.abs(value);
    }
  }
  sizes.sort();
  return { top: sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1, signed };
}

// Of the columns that share a pixel the largest is drawn: nothing loud gets lost.
function loudest(cells, r, from, to) {
  let best = cells.at(r, from);
  for (let c = from + 1; c < to; c++)
    if (Math.abs(cells.at(r, c)) > Math.abs(best)) best = cells.at(r, c);
  return best;
}

const SHADES = 256; // on either side of zero
const MASKED = 0x28808080; // pale grey

// All colours of a picture, as the bytes of a pixel from low to high: red, green, blue, opacity.
function shades() {
  const colour = palette();
  return Uint32Array.from({ length: 2 * SHADES + 1 }, (_, i) => {
    const [r, g, b] = colour(i / SHADES - 1);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
}

function paint(canvas, cells, limit, most = cells.columns) {
  canvas.width = Math.min(most, cells.columns);
  canvas.height = cells.rows;
  const context = canvas.getContext('2d');
  const image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  const colour = shades();
  const [width, share] = [canvas.width, cells.columns / canvas.width];
  for (let r = 0, i = 0; r < cells.rows; r++) {
    for (let x = 0; x < width; x++, i++) {
      const first = Math.floor(x * share);
      const value = loudest(cells, r, first, Math.max(Math.floor((x + 1) * share), first + 1));
      pixels[i] =
        value === null ? MASKED : colour[Math.round(SHADES * (1 + clamp(value / limit, -1, 1)))];
    }
  }
  context.putImageData(image, 0, 0);
}

// Pictures far below the window are drawn when they come near it: a click answers at once.
const waiting = new WeakMap();
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      waiting.get(target)();
    }
  },
  { rootMargin: '400px' },
);

function whenSeen(node, draw) {
  waiting.set(node, draw);
  watcher.observe(node);
}

const MOVES = {
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  PageUp: [0, -16],
  PageDown: [0, 16],
};
const WIDE = 480; // pixels

const clamp = (x, low, high) => Math.max(low, Math.min(x, high));

function heatmap(
  name,
  cells,
  {
    row = state.token,
    column = 0,
    rowName = piece,
    columnName = (c) => `channel ${c}`,
    limit,
  } = {},
) {
  let top = limit; // known when it is drawn
  const room = document.getElementById('step').clientWidth;
  const side = room < WIDE ? 2 : 4; // numbers written out on either side
  const at = { row: Math.min(row, cells.rows - 1), column: Math.min(column, cells.columns - 1) };
  const value = el('output', { class: 'value mono', 'aria-live': 'polite' });
  const near = el('div', { class: 'near mono', 'aria-hidden': 'true' });
  const canvas = el('canvas', {
    tabindex: 0,
    role: 'application',
    'aria-roledescription': 'heat map',
    'data-map': name,
    'aria-label': `${name}, ${cells.rows} × ${cells.columns}; arrow keys read single numbers`,
  });
  const rowHeight = clamp(Math.round(300 / cells.rows), 14, 28);
  canvas.style.height = `${rowHeight * cells.rows}px`;
  canvas.style.imageRendering = 'pixelated';

  function show(r, c) {
    [at.row, at.column] = [clamp(r, 0, cells.rows - 1), clamp(c, 0, cells.columns - 1)];
    const number = cells.at(at.row, at.column);
    value.textContent = `${rowName(at.row)} · ${columnName(at.column)}: ${number === null ? 'masked' : exact(number)}`;
    const first = clamp(at.column - side, 0, Math.max(cells.columns - 2 * side - 1, 0));
    const colour = palette();
    near.replaceChildren();
    for (let k = first; k < Math.min(first + 2 * side + 1, cells.columns); k++) {
      const x = cells.at(at.row, k);
      const cell = el(
        'span',
        { class: k === at.column ? 'here' : null },
        x === null ? '–' : exact(x),
      );
      if (x !== null) tinted(cell, colour((0.35 * x) / top));
      near.append(cell);
    }
  }

  function follow(event) {
    const box = canvas.getBoundingClientRect();
    show(
      Math.floor(((event.clientY - box.top) / box.height) * cells.rows),
      Math.floor(((event.clientX - box.left) / box.width) * cells.columns),
    );
  }

  canvas.addEventListener('pointermove', follow);
  canvas.addEventListener('pointerdown', follow);
  canvas.addEventListener('keydown', (event) => {
    const move = MOVES[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    show(at.row + move[0], at.column + move[1]);
  });

  const names = el('div', { class: 'rows mono', 'aria-hidden': 'true' });
  names.style.setProperty('--row', `${rowHeight}px`);
  for (let r = 0; r < cells.rows; r++)
    names.append(el('span', { class: r === state.token ? 'chosen' : null }, rowName(r)));
  const shown = picture(el('div', { class: 'heat' }, names, canvas), value, near);
  whenSeen(shown, () => {
    const ends = limit ? { top: limit, signed: false } : reach(cells);
    top = ends.top;
    show(at.row, at.column);
    paint(canvas, cells, top, Math.max(Math.floor(room * devicePixelRatio), 64));
    shown.append(legend(top, ends.signed, limit));
  });
  return shown;
}

const legend = (top, signed, limit) =>
  el(
    'div',
    { class: 'legend', 'aria-hidden': 'true' },
    signed ? exact(-top) : '0',
    el('i', { class: signed ? null : 'up' }),
    limit ? exact(top) : `${exact(top)} and more`,
  );

// Tensors of a layer below each other, or why they are not here.
function tensors(places) {
  const layer = walk.layers[state.layer];
  if (!layer) return [missing()];
  return places.map(([place, title]) => {
    const tensor = place in ends ? ends[place] : layer[place];
    const heads = tensor.shape.length === 3 ? tensor.shape[0] : 0;
    const head =
      heads === config.n_kv_heads && heads !== config.n_heads
        ? Math.floor(state.head / config.group_size)
        : state.head;
    const full = heads
      ? `${title}, ${heads === config.n_heads ? 'head' : 'kv head'} ${head}`
      : title;
    return el(
      'section',
      {},
      heading(full),
      caption(`${place}: ${tensor.shape.join(' × ')}`),
      heatmap(place, matrix(tensor, head)),
    );
  });
}

function missing() {
  const here = Object.keys(walk.layers).join(', ');
  return el(
    'p',
    { class: 'note' },
    `The full tensors of layer ${state.layer} are not in this file; those of layer ${here} are. Make it again with --layers ${state.layer} or --layers all.`,
  );
}
