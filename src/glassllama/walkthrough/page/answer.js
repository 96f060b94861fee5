// Pictures of steps 12 to 15: all layers, logits, sampling, the cache.

function normChart() {
  const [width, height, left] = [560, 190, 44];
  const logs = walk.residual_norms.map((row) => row.map((v) => Math.log10(Math.max(v, 1e-6))));
  const [low, high] = [Math.floor(Math.min(...logs.flat())), Math.ceil(Math.max(...logs.flat()))];
  const x = (n) => left + ((width - left - 10) * n) / config.n_layers;
  const y = (v) => height - 22 - ((height - 32) * (v - low)) / Math.max(high - low, 1);
  const drawing = svg('svg', { viewBox: `0 0 ${width} ${height}`, width: 720, role: 'img', 'aria-label': `Length of the residual stream, from ${exact(walk.residual_norms[0][state.token])} to ${exact(walk.residual_norms.at(-1)[state.token])} for ${piece(state.token)}` });
  for (let d = low; d <= high; d++) drawing.append(svg('line', { class: 'grid', x1: left, x2: width, y1: y(d), y2: y(d) }), svg('text', { class: 'quiet', x: left - 5, y: y(d) + 4, 'text-anchor': 'end' }, d < 5 ? exact(10 ** d) : `1e${d}`));
  const line = (t) => drawing.append(svg('polyline', { class: t === state.token ? 'wire chosen' : 'wire', points: logs.map((row, n) => `${x(n)},${y(row[t])}`).join(' ') }));
  for (let t = 0; t < T; t++) if (t !== state.token) line(t);
  line(state.token);
  for (const n of [0, Math.round(config.n_layers / 2), config.n_layers]) drawing.append(svg('text', { class: 'quiet', x: x(n), y: height - 5, 'text-anchor': n ? 'end' : 'start' }, n ? `layer ${n - 1}` : 'embedding'));
  return drawing;
}

// Arrow keys go from cell to cell, so that Tab need not pass all of them.
function moveInTable(event) {
  const move = MOVES[event.key];
  const cell = event.target.closest('td');
  if (!move || !cell) return;
  event.preventDefault();
  const row = cell.parentNode.parentNode.rows[cell.parentNode.sectionRowIndex + move[0]];
  const next = row?.cells[cell.cellIndex + move[1]]?.querySelector('button');
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function lensTable(details) {
  const { first_position: first, pieces, probabilities } = walk.logit_lens;
  const colour = palette();
  const layerName = (n) => (n === 0 ? 'embedding' : `layer ${n - 1}`);
  const tell = (n, k) => details.replaceChildren(`${layerName(n)}, after ${piece(first + k)}: ${pieces[n][k].map((p, i) => `${p} ${percent(probabilities[n][k][i])}`).join(', ')}`);
  const body = el('tbody');
  for (let n = config.n_layers; n >= 0; n--) {
    body.append(el('tr', {}, el('th', { scope: 'row' }, layerName(n)), pieces[n].map((tops, k) => {
      const cell = el('td', {}, el('button', { type: 'button', class: 'mono', tabindex: n === config.n_layers && first + k === T - 1 ? 0 : -1, 'aria-label': `${layerName(n)}, after ${piece(first + k)}: ${tops[0]}, ${percent(probabilities[n][k][0])}`, onclick: () => tell(n, k), onmouseenter: () => tell(n, k), onfocus: () => tell(n, k) }, tops[0]));
      cell.style.backgroundColor = `rgb(${colour(probabilities[n][k][0]).join(' ')} / 70%)`;
      return cell;
    })));
  }
  const last = Math.max(state.token - first, 0);
  tell(config.n_layers, last);
  return el('div', { class: 'picture lens', role: 'region', 'aria-label': 'Logit lens, arrow keys move', onkeydown: moveInTable }, el('table', {},
    el('thead', {}, el('tr', {}, el('th', {}, 'after'), pieces[0].map((_, k) => el('th', { scope: 'col', class: first + k === state.token ? 'mono chosen' : 'mono' }, piece(first + k))))), body));
}

function showLayers() {
  const details = el('output', { class: 'value', 'aria-live': 'polite' });
  return [
    heading('How long the residual stream is'), picture(normChart()),
    caption(`A line for each token, ${piece(state.token)} in colour; the scale is logarithmic.`),
    heading('Logit lens: what each layer would say'), details, lensTable(details),
    caption('The stronger the colour, the surer. Read a column from the bottom up.'),
  ];
}

function showLogits(step) {
  const { pieces, probabilities } = walk.predictions;
  return [
    heading(`Ten likeliest after ${piece(T - 1)}`),
    picture(bars('Ten likeliest', step.data.top.map((top) => ({ name: top.piece, value: top.probability, text: percent(top.probability) })), 1)),
    heading(`Expected after position ${state.token}, ${piece(state.token)}`),
    picture(bars('Expected after the chosen token', pieces[state.token].map((name, i) => ({ name, value: probabilities[state.token][i], text: percent(probabilities[state.token][i]) })), 1)),
    heading('The last norm'), heatmap('norm', matrix(ends.norm)),
  ];
}

// Probabilities of the listed tokens, all others counted in, then top-k and top-p as the sampler does.
function distribution({ temperature, topK, topP }) {
  const { logits, others } = walk.probabilities;
  const place = others.temperatures.findIndex((t) => Math.abs(t - temperature) < 1e-6);
  const rest = others.count ? others.log_sums[place] : -Infinity;
  const largest = Math.max(logits[0] / temperature, rest);
  const powers = logits.map((z) => Math.exp(z / temperature - largest));
  let beyond = Math.exp(rest - largest);
  const total = powers.reduce((a, b) => a + b, beyond);
  const before = powers.map((p) => p / total);
  if (topK) beyond = 0;
  const alive = before.map((p, i) => (topK && logits[i] < logits[topK - 1] ? 0 : p));
  const mass = alive.reduce((a, b) => a + b, beyond / total);
  let [sum, kept] = [0, 0];
  while (kept < alive.length && alive[kept] > 0 && (kept === 0 || sum < topP * mass)) sum += alive[kept++];
  const open = topP === 1 ? beyond > 0 : sum < topP * mass; // the cut lies among tokens that are not listed
  const final = alive.map((p, i) => (i < kept ? p / (open ? topP * mass : topP === 1 ? mass : sum) : 0));
  return { before, final, kept, open, beyond: 1 - before.reduce((a, b) => a + b, 0) };
}

const LISTED = 16;

function drawDistribution(target) {
  const { before, final, kept, open, beyond } = distribution(state);
  const rows = walk.probabilities.pieces.slice(0, LISTED).map((name, i) => ({ name, value: final[i], text: i < kept ? percent(final[i]) : `cut (${percent(before[i])})`, out: i >= kept }));
  target.replaceChildren(
    bars('Probabilities', rows, 1),
    el('p', { id: 'kept', 'aria-live': 'polite' }, open ? `More than ${kept} tokens can be drawn, some of them not listed in this file.` : `${kept} of ${whole(config.vocab_size)} tokens can be drawn.`),
    caption(`Before the cuts the ${whole(walk.probabilities.others.count)} tokens that are not listed here have ${percent(Math.max(beyond, 0))} together.`));
}

function showSampling(step) {
  const target = el('div', { id: 'distribution' });
  const set = (name) => (value) => { state[name] = value; drawDistribution(target); };
  const grid = walk.probabilities.others.temperatures;
  const most = walk.probabilities.ids.length;
  drawDistribution(target);
  const named = new Map(walk.probabilities.ids.map((id, i) => [id, walk.probabilities.pieces[i]]));
  return [
    heading('Try it'),
    controls(
      slider('temperature', { min: grid[0], max: grid.at(-1), step: 0.1, value: state.temperature, show: (v) => v.toFixed(1) }, set('temperature')),
      slider('top-k', { min: 0, max: most, value: state.topK, show: (v) => (v ? String(v) : 'off') }, set('topK')),
      slider('top-p', { min: 0.05, max: 1, step: 0.01, value: state.topP, show: (v) => v.toFixed(2) }, set('topP'))),
    picture(target),
    heading(`What the seeds 0 to ${step.data.draws.length - 1} draw at temperature ${step.data.temperature}, top-p ${step.data.top_p}`),
    picture(el('div', { class: 'cells' }, step.data.draws.map((id, seed) => el('span', { class: 'cell mono' }, named.get(id) ?? `#${id}`, el('small', {}, `seed ${seed}`))))),
  ];
}

// One column of the cache a token: what was computed in this run, and what only waits.
function drawCache(target, made) {
  const all = [...walk.tokens.map((token) => token.piece), ...made.map((token) => token.piece)];
  const fed = T + state.made;
  const numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim;
  const kept = state.made ? fed - 1 : 0;
  const next = made[state.made];
  target.replaceChildren(
    el('div', { class: 'cells' }, all.slice(0, -1).map((name, i) => {
      const kind = i >= fed ? 'empty' : i < kept ? 'kept' : 'new';
      return el('span', { class: `cell mono ${kind}` }, i < fed ? name : '·', el('small', {}, { empty: 'free', kept: 'cached', new: 'computed' }[kind]));
    })),
    el('p', { id: 'cached', 'aria-live': 'polite' }, `${kept} tokens from the cache, ${fed - kept} computed${next ? `; out comes ${next.piece} (${percent(next.probability)})` : ''}. The cache holds ${whole(fed * numbers)} numbers: 2 × ${config.n_layers} layers × ${config.n_kv_heads} heads × ${config.head_dim} a token.`));
}

function showCache(step) {
  const made = step.data.continuation;
  const target = el('div');
  const most = Math.max(made.length - 1, 0);
  const go = slider('tokens made', { min: 0, max: most, value: state.made }, (n) => { state.made = n; drawCache(target, made); });
  const input = go.querySelector('input');
  const more = el('button', { type: 'button', onclick: () => { input.value = (Number(input.value) + 1) % (most + 1); input.dispatchEvent(new Event('input')); } }, 'next token');
  drawCache(target, made);
  return [heading('Keys and values, token by token'), controls(go, more), picture(target)];
}

function showExperiment(done) {
  const side = (name, made) => el('section', {}, heading(`${name}: expected after ${piece(state.token)}`),
    picture(bars(name, made.predictions.pieces[state.token].map((text, i) => ({ name: text, value: made.predictions.probabilities[state.token][i], text: percent(made.predictions.probabilities[state.token][i]) })), 1)),
    el('p', {}, 'goes on: ', el('code', {}, made.continuation.pieces.join(''))),
    heatmap(`attention, ${name}`, matrix(made.weights), { limit: 1, columnName: (c) => `listens to ${piece(c)}` }));
  return [
    heading('Bits between right and wrong'), picture(bars('Divergence', done.divergence_bits.map((value, t) => ({ name: piece(t), value })))),
    side('right', done.right), side('wrong', done.wrong),
  ];
}
