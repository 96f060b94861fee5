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
function reach({ rows, columns, at }) {
  const sizes = [];
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) sizes.push(Math.abs(at(r, c) ?? 0));
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1;
}

// Of the columns that share a pixel the largest is drawn: nothing loud gets lost.
function loudest(cells, r, from, to) {
  let best = cells.at(r, from);
  for (let c = from + 1; c < to; c++) if (Math.abs(cells.at(r, c)) > Math.abs(best)) best = cells.at(r, c);
  return best;
}

function paint(canvas, cells, limit, width = cells.columns) {
  canvas.width = Math.min(width, cells.columns);
  canvas.height = cells.rows;
  const context = canvas.getContext('2d');
  const image = context.createImageData(canvas.width, canvas.height);
  const colour = palette();
  const share = cells.columns / canvas.width;
  for (let r = 0, i = 0; r < cells.rows; r++) {
    for (let x = 0; x < canvas.width; x++, i += 4) {
      const value = loudest(cells, r, Math.floor(x * share), Math.max(Math.floor((x + 1) * share), Math.floor(x * share) + 1));
      image.data.set(value === null ? [128, 128, 128, 40] : [...colour(value / limit), 255], i);
    }
  }
  context.putImageData(image, 0, 0);
}

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -16], PageDown: [0, 16] };
const NEAR = 4; // numbers written out on either side

const clamp = (x, low, high) => Math.max(low, Math.min(x, high));

function heatmap(name, cells, { row = state.token, column = 0, rowName = piece, columnName = (c) => `channel ${c}`, limit } = {}) {
  const top = limit ?? reach(cells);
  const at = { row: Math.min(row, cells.rows - 1), column: Math.min(column, cells.columns - 1) };
  const value = el('output', { class: 'value mono', 'aria-live': 'polite' });
  const near = el('div', { class: 'near mono', 'aria-hidden': 'true' });
  const canvas = el('canvas', {
    tabindex: 0, role: 'application', 'aria-roledescription': 'heat map', 'data-map': name,
    'aria-label': `${name}, ${cells.rows} × ${cells.columns}; arrow keys read single numbers`,
  });
  const rowHeight = clamp(Math.round(300 / cells.rows), 14, 28);
  canvas.style.height = `${rowHeight * cells.rows}px`;
  canvas.style.imageRendering = 'pixelated';

  function show(r, c) {
    [at.row, at.column] = [clamp(r, 0, cells.rows - 1), clamp(c, 0, cells.columns - 1)];
    const number = cells.at(at.row, at.column);
    value.textContent = `${rowName(at.row)} · ${columnName(at.column)}: ${number === null ? 'masked' : exact(number)}`;
    const first = clamp(at.column - NEAR, 0, Math.max(cells.columns - 2 * NEAR - 1, 0));
    const colour = palette();
    near.replaceChildren();
    for (let k = first; k < Math.min(first + 2 * NEAR + 1, cells.columns); k++) {
      const x = cells.at(at.row, k);
      const cell = el('span', { class: k === at.column ? 'here' : null }, x === null ? '–' : exact(x));
      if (x !== null) cell.style.backgroundColor = `rgb(${colour(x / top).join(' ')} / 35%)`;
      near.append(cell);
    }
  }

  function follow(event) {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientY - box.top) / box.height) * cells.rows), Math.floor(((event.clientX - box.left) / box.width) * cells.columns));
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
  for (let r = 0; r < cells.rows; r++) names.append(el('span', { class: r === state.token ? 'chosen' : null }, rowName(r)));
  show(at.row, at.column);
  const width = Math.max(Math.floor((document.getElementById('step').clientWidth - 120) * devicePixelRatio), 64);
  paint(canvas, cells, top, width);
  return picture(el('div', { class: 'heat' }, names, canvas), value, near, legend(top, cells));
}

function legend(top, cells) {
  const signed = [...Array(cells.rows).keys()].some((r) => {
    for (let c = 0; c < cells.columns; c++) if (cells.at(r, c) < 0) return true;
    return false;
  });
  return el('div', { class: 'legend', 'aria-hidden': 'true' }, signed ? exact(-top) : '0', el('i', { class: signed ? null : 'up' }), `${exact(top)} and more`);
}

// Tensors of a layer below each other, or why they are not here.
function tensors(places) {
  const layer = walk.layers[state.layer];
  if (!layer) return [missing()];
  return places.map(([place, title]) => {
    const tensor = place in ends ? ends[place] : layer[place];
    const heads = tensor.shape.length === 3 ? tensor.shape[0] : 0;
    const head = heads === config.n_kv_heads && heads !== config.n_heads ? Math.floor(state.head / config.group_size) : state.head;
    const full = heads ? `${title}, ${heads === config.n_heads ? 'head' : 'kv head'} ${head}` : title;
    return el('section', {}, heading(full), caption(`${place}: ${tensor.shape.join(' × ')}`),
      heatmap(place, matrix(tensor, head)));
  });
}

function missing() {
  const here = Object.keys(walk.layers).join(', ');
  return el('p', { class: 'note' }, `The full tensors of layer ${state.layer} are not in this file; those of layer ${here} are. Make it again with --layers ${state.layer} or --layers all.`);
}
