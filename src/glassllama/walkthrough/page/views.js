// One view for each step: the pictures between its text and its checks.
const hex = (byte) => byte.toString(16).padStart(2, '0');

const tokenChips = (below) =>
  picture(el('div.chips', {}, walk.tokens.map((token) =>
    el('span.chip', {}, el('b.mono', {}, token.piece), el('code', {}, below(token))))));

const showPrompt = () => [
  heading('Every token and its bytes'),
  tokenChips((token) => (token.bytes ? token.bytes.map(hex).join(' ') : 'a special token')),
];

function showIds({ data: { merges } }) {
  const line = (parts) => cells(parts.split(' ').map((part) => el('span.cell.mono', {}, part)));
  return [
    heading('Tokens and their ids'),
    tokenChips((token) => whole(token.id)),
    merges.length ? [heading('The merges of one pre-token'), picture(merges.map(line))] : [],
  ];
}

function showFile({ data }) {
  const text = (value) =>
    Array.isArray(value) ? value.join(' × ') : typeof value === 'number' ? whole(value) : value;
  return [
    heading('Size of the parts'),
    barPicture('Bytes by part', Object.entries(data.bytes), (n) => `${(n / 1e6).toFixed(1)} MB`),
    heading('The tensor that was read'),
    picture(table(null, Object.entries(data.tensor).map(([name, v]) => [name, text(v)]))),
  ];
}

const showConfig = ({ data }) => [
  heading('All settings'),
  picture(table(['setting', 'value'], Object.entries(data.config).map(([name, value]) => [
    name, Number.isInteger(value) ? whole(value) : String(value)]))),
  Object.keys(data.decisions).length ? [
    heading('Design decisions'),
    picture(table(['decision', 'value'], Object.entries(data.decisions))),
  ] : [],
];

const showEmbedding = () => [
  outsideMap('tok_embeddings', 'One row per token'),
  outsideMap('pos_embeddings', 'One row per position'),
  outsideMap('embeddings', outside.pos_embeddings ? 'Their sum' : 'Multiplied'),
];

const showPositions = () => outside.pos_embeddings ? [
  outsideMap('pos_embeddings', 'The vectors of the positions'),
  outsideMap('embeddings', 'The input of the first layer'),
] : [controls(headSlider()), tensors({ 'attention.q_rope': 'q: not rotated' })];

// A slider that chooses the layer or the head, if there are several.
const chooser = (name, count) => count > 1
  ? slider(name, { max: count - 1, value: state[name] }, (n) => change({ [name]: n }, name))
  : null;
const layerSlider = () => chooser('layer', config.n_layers);
const headSlider = () => chooser('head', config.n_heads);

const showNorm = ({ data }) => [
  controls(layerSlider()),
  tensors({
    [data.input]: data.input === 'input' ? 'Input of the layer' : 'Input of the norm',
    [data.norm]: 'Normalized',
  }),
];

const showHeads = () => [
  controls(layerSlider(), headSlider()),
  tensors({
    'attention.q': 'q: queries', 'attention.k': 'k: keys', 'attention.v': 'v: values',
    'attention.q_norm': 'q, normalized', 'attention.k_norm': 'k, normalized',
  }),
];

// Query heads above, the KV heads that they share below.
function showGroups() {
  const [heads, groups, size] = [config.n_heads, config.n_kv_heads, config.group_size];
  const width = Math.max(heads * 34, 340);
  const x = (i, count) => ((i + 0.5) * width) / count;
  const kvHead = Math.floor(state.head / size);
  const wires = range(heads).map((h) => svg(h === state.head ? 'line.wire.chosen' : 'line.wire', {
    x1: x(h, heads), y1: 48, x2: x(Math.floor(h / size), groups), y2: 118,
  }));
  const node = (i, count, y, chosen, text, label, head) => {
    const pick = () => change({ head }, `node ${y} ${i}`);
    return svg('g', {
      role: 'button', tabindex: 0, 'aria-label': label, 'aria-pressed': String(chosen),
      'data-focus': `node ${y} ${i}`, onclick: pick,
      onkeydown: (event) => {
        if (event.key !== 'Enter' && event.key !== ' ') return;
        event.preventDefault();
        pick();
      },
    },
    svg(chosen ? 'circle.node.chosen' : 'circle.node', { cx: x(i, count), cy: y, r: 14 }),
    svg('text', { x: x(i, count), y: y + 4, 'text-anchor': 'middle' }, text));
  };
  return [
    controls(headSlider()),
    picture(svg('svg', {
      viewBox: `0 0 ${width} 170`, width, role: 'group',
      'aria-label': `${heads} query heads use ${groups} KV heads`,
    },
    wires,
    range(heads).map((h) => node(h, heads, 34, h === state.head, `q${h}`, `query head ${h}`, h)),
    range(groups).map((g) =>
      node(g, groups, 132, g === kvHead, `kv${g}`, `KV head ${g}`, g * size)))),
    caption(`Query head ${state.head} uses KV head ${kvHead}. ` + (size > 1
      ? `With groups of ${size} the KV cache is ${size} times smaller than with one KV head per query head.`
      : 'Every query head has a KV head of its own.')),
    tensors({ 'attention.k': 'The keys' }),
  ];
}

// An arrow from the center to the right, `tip` wide at its point.
const arrowPath = (length, tip) =>
  `M0 0H${length}M${length - 1.4 * tip} ${-tip}L${length} 0L${length - 1.4 * tip} ${tip}`;

// Turn a dial to the angle, counterclockwise from the right.
function turnDial(dial, angle) {
  dial.querySelector('.hand').style.transform = `rotate(${-angle}rad)`;
  dial.setAttribute('aria-label', `pair ${dial.dataset.dial}: ${exact(angle)} radians`);
  return dial;
}

const angleDial = (i, angle) => turnDial(button('button', {
  'aria-pressed': String(i === state.pair), 'data-focus': `dial ${i}`, 'data-dial': i,
  onclick: () => change({ pair: i }, `dial ${i}`),
},
svg('svg', { viewBox: '-20 -20 40 40', width: 40, height: 40, 'aria-hidden': 'true' },
  svg('circle.ring', { r: 17 }), svg('path.hand', { d: arrowPath(15, 4) })),
`pair ${i}`), angle);

function showRope({ data }) {
  if (!data.layers.includes(state.layer))
    return [
      controls(layerSlider()),
      note(`Layer ${state.layer} has another RoPE than layer ${walk.layer}, or none. Create the page again with --layer ${state.layer}.`),
    ];
  const angles = matrix(walk.angles);
  const show = (t) => `${t} ${piece(t)}`;
  // Turns the dials that are there, so that their movement can be seen; draws the pair anew.
  const moved = (t) => change({ token: t }, 'position', () => {
    for (const dial of document.querySelectorAll('[data-dial]'))
      turnDial(dial, angles.at(t, Number(dial.dataset.dial)));
    byId('pair')?.replaceWith(...rotatedPair(data.layout, angles.at(t, state.pair)));
  });
  return [
    controls(slider('position', { max: T - 1, value: state.token, show }, moved), headSlider()),
    caption('Every pair of coordinates has an angle. Change the position: the first pairs rotate fast, the last ones slowly.'),
    picture(el('div.dials', {},
      range(angles.columns).map((i) => angleDial(i, angles.at(state.token, i))))),
    rotatedPair(data.layout, angles.at(state.token, state.pair)),
    tensors({ [beforeRope(walk.layers[state.layer])]: 'q before', 'attention.q_rope': 'q after' }),
  ];
}

// The hook of queries before RoPE, normalized if the layer has a QK-norm.
const beforeRope = (layer) =>
  layer && 'attention.q_norm' in layer ? 'attention.q_norm' : 'attention.q';

function rotatedPair(layout, angle) {
  const layer = walk.layers[state.layer];
  if (!layer) return [];
  const i = state.pair; // its coordinates: neighbors, or one in each half of those that rotate
  const [a, b] = layout === 'interleaved'
    ? [2 * i, 2 * i + 1] : [i, i + walk.angles.shape.at(-1)];
  const [before, after] = [beforeRope(layer), 'attention.q_rope'].map((hook) => {
    // One RMSNorm for all heads: they are side by side.
    const first = layer[hook].shape.length === 2 ? state.head * config.head_dim : 0;
    return [a, b].map((c) => matrix(layer[hook], state.head).at(state.token, first + c));
  });
  const size = Math.max(Math.hypot(...before), Math.hypot(...after), 1e-9) / 70;
  const arrow = ([x, y], kind) => svg(`path.${kind}`, {
    d: arrowPath(Math.hypot(x, y) / size, 5), 'stroke-width': 3,
    transform: `rotate(${(-Math.atan2(y, x) * 180) / Math.PI})`,
  });
  return [el('div.picture.side', { id: 'pair' },
    svg('svg', {
      viewBox: '-90 -90 180 180', width: 180, role: 'img',
      'aria-label': `the pair before and after it is rotated by ${exact(angle)} radians`,
    },
    svg('circle.ring', { r: 70 }), gridLine(-85, 85), gridLine(null, null, -85, 85),
    arrow(before, 'before'), arrow(after, 'hand')),
    el('div', {},
      el('p', {}, `Pair ${i} of q, head ${state.head}, at position ${state.token} (${piece(state.token)}), coordinates ${a} and ${b}:`),
      [`before  ${before.map(exact).join(', ')}`,
        `rotated by ${exact(angle)} radians${config.qk_norm ? ', head divided by its RMS' : ''}`,
        `after   ${after.map(exact).join(', ')}`].map((line) => el('p.mono', {}, line))))];
}

const gridLine = (x1, x2, y1, y2) => svg('line.grid', { x1, x2, y1, y2 });
const label = (x, y, anchor, text) =>
  svg('text.quiet', { x, y, 'text-anchor': anchor }, text);
const curve = (chosen, points) =>
  svg(chosen ? 'polyline.wire.chosen' : 'polyline.wire', { points: points.join(' ') });

function showAttention() {
  const heads = walk.attention.weights[state.layer];
  if (!heads)
    return [
      controls(layerSlider()),
      note(`For a prompt of this length the file has the attention weights of layer ${walk.layer} only.`),
    ];
  const window = walk.windows[state.layer];
  const map = (flat, h) => {
    const canvas = el('canvas', { 'aria-hidden': 'true' });
    paint(canvas, triangle(flat, window), 1);
    const bits = walk.attention.entropy_bits[state.layer][h][state.token];
    return button('button', {
      'aria-pressed': String(h === state.head), 'data-focus': `head ${h}`,
      'aria-label': `head ${h}, entropy ${exact(bits)} bits`,
      onclick: () => change({ head: h }, `head ${h}`),
    }, `head ${h} · ${bits.toFixed(1)} bits`, canvas);
  };
  const weights = triangle(heads[state.head], window);
  const visible = range(state.token + 1);
  const scores = walk.layers[state.layer]?.['attention.scores'];
  return [
    controls(layerSlider(), headSlider()),
    picture(el('div.maps', {
      role: 'group', 'aria-label': `Attention weights of all heads of layer ${state.layer}`,
    }, heads.map(map))),
    caption('Rows are queries, columns are keys. Bits: the entropy of the attention weights of the chosen token.'
      + (window ? ` Gray: hidden, by the causal mask or by the window of ${window} tokens.` : '')),
    heading(`Layer ${state.layer}, head ${state.head}`),
    weightsMap('attention.weights', weights, state.token),
    heading(`Attention weights of ${piece(state.token)}`),
    probabilityBars('Attention weights', visible.map(piece),
      visible.map((c) => weights.at(state.token, c) ?? 0)),
    scores ? [
      heading('Scores, before mask and softmax'),
      heatmap('attention.scores', matrix(scores, state.head),
        { columnName: (c) => `key of ${piece(c)}` }),
    ] : [],
  ];
}

const weightsMap = (name, weights, column) =>
  heatmap(name, weights, { limit: 1, column, columnName: (c) => `attends to ${piece(c)}` });

const showResidual = ({ data }) => [
  controls(layerSlider(), headSlider()),
  state.layer === walk.layer ? [
    heading(`What each head adds to ${piece(T - 1)}`),
    barPicture('L2 norm that each head adds',
      data.head_contributions.map((value, h) => [`head ${h}`, value]), exact),
  ] : [],
  tensors({
    'attention.heads': 'Weighted sums of values',
    'attention.wo': 'Output of wo',
    post_attention_norm: 'Output of wo, normalized',
    after_attention: 'Residual stream after attention',
  }),
];

const GATES = {
  silu: (z) => z / (1 + Math.exp(-z)),
  gelu: (z) => (z * (1 + Math.tanh(0.7978845608 * (z + 0.044715 * z ** 3)))) / 2,
};
const BINS = 60;

// The curve of silu or gelu, and a histogram of its inputs for the chosen token.
function gateCurve(gate, inputs) {
  const high = Math.max(2, ...inputs.map(Math.abs));
  const [x, y] = [(z) => 160 + (150 * z) / high, (v) => 145 - (135 * v) / high];
  const counts = new Array(BINS).fill(0);
  for (const z of inputs)
    counts[clamp(Math.floor((BINS * (z + high)) / (2 * high)), 0, BINS - 1)]++;
  const unit = 50 / Math.max(...counts);
  return svg('svg', {
    viewBox: '0 0 320 250', width: 480, role: 'img',
    'aria-label': `${gate} of ${inputs.length} inputs; largest input ${exact(Math.max(...inputs))}`,
  },
  gridLine(5, 315, y(0), y(0)),
  gridLine(x(0), x(0), 5, 175),
  curve(true, range(121).map((i) => high * (i / 60 - 1)).map((z) => `${x(z)},${y(GATES[gate](z))}`)),
  counts.map((count, i) => svg('rect.count', {
    x: 10 + (300 * i) / BINS, width: 300 / BINS - 0.6, y: 232 - unit * count, height: unit * count,
  })),
  [-high, 0, high].map((z) =>
    label(x(z), 246, z < 0 ? 'start' : z ? 'end' : 'middle', exact(z))));
}

// Gated (gate, up, gated) or not (up, activated).
function showFeedForward({ data: { activation } }) {
  const layer = walk.layers[state.layer];
  if (!layer) return [controls(layerSlider()), missingLayer()];
  const gate = 'feed_forward.gated' in layer ? activation.split('_')[0] : null;
  const titles = gate
    ? { gate: 'gate', up: 'up', gated: `${gate}(gate) × up` }
    : { up: 'up', activated: `${activation}(up)` };
  const hooks = Object.keys(titles).map((name) => `feed_forward.${name}`);
  const data = hooks.map((hook) => matrix(layer[hook]));
  const features = range(data[0].columns);
  const size = (c) => Math.abs(data.at(-1).at(state.token, c));
  const top = [...features].sort((a, b) => size(b) - size(a)).slice(0, 8);
  return [
    controls(layerSlider()),
    gate ? [
      heading(`The gates of ${piece(state.token)}`),
      picture(gateCurve(gate, features.map((c) => data[0].at(state.token, c)))),
      caption(`The curve is ${gate}. Below it, how many features have which gate: ${gate} is near 0 on the left.`),
    ] : [],
    heading('The largest features'),
    picture(table(['feature', ...Object.values(titles)],
      top.map((c) => [String(c), ...data.map((each) => each.at(state.token, c))]))),
    tensors({
      ...Object.fromEntries(Object.values(titles).map((title, i) => [hooks[i], title])),
      'feed_forward.down': 'Output of down',
      post_ffn_norm: 'Output of down, normalized',
      output: 'Residual stream after the layer',
    }),
  ];
}

const layerName = (n) => (n === 0 ? 'embedding' : `layer ${n - 1}`);

// Norms of the residual stream, one line per token, on a logarithmic scale.
function normChart() {
  const [width, height, left] = [560, 190, 44];
  const logs = walk.residual_norms.map((row) => row.map((v) => Math.log10(Math.max(v, 1e-6))));
  const [low, high] = [Math.floor(Math.min(...logs.flat())), Math.ceil(Math.max(...logs.flat()))];
  const x = (n) => left + ((width - left - 10) * n) / config.n_layers;
  const y = (v) => height - 22 - ((height - 32) * (v - low)) / Math.max(high - low, 1);
  const [first, last] = [walk.residual_norms[0], walk.residual_norms.at(-1)].map((norms) =>
    exact(norms[state.token]));
  const line = (t) => curve(t === state.token, logs.map((row, n) => `${x(n)},${y(row[t])}`));
  return svg('svg', {
    viewBox: `0 0 ${width} ${height}`, width: 720, role: 'img',
    'aria-label': `Norm of the residual stream, from ${first} to ${last} for ${piece(state.token)}`,
  },
  range(high - low + 1).map((i) => i + low).map((d) => [
    gridLine(left, width, y(d), y(d)),
    label(left - 5, y(d) + 4, 'end', d < 5 ? exact(10 ** d) : `1e${d}`),
  ]),
  range(T).filter((t) => t !== state.token).map(line),
  line(state.token),
  [0, Math.round(config.n_layers / 2), config.n_layers].map((n) =>
    label(x(n), height - 5, n ? 'end' : 'start', layerName(n))));
}

// Arrow keys move between cells, so that Tab does not stop at each.
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
  const color = palette();
  const where = (n, k) => `${layerName(n)}, after ${piece(first + k)}`;
  const show = (n, k) => {
    const list = pieces[n][k].map((p, i) => `${p} ${percent(probabilities[n][k][i])}`).join(', ');
    details.replaceChildren(`${where(n, k)}: ${list}`);
  };
  const cell = (n, k, top) => {
    const p = probabilities[n][k][0];
    const showThis = () => show(n, k);
    const td = el('td', {}, button('button.mono', {
      tabindex: n === config.n_layers && first + k === T - 1 ? 0 : -1,
      'aria-label': `${where(n, k)}: ${top}, ${percent(p)}`,
      onclick: showThis, onmouseenter: showThis, onfocus: showThis,
    }, top));
    tint(td, color(0.7 * p));
    return td;
  };
  const rows = range(config.n_layers + 1).reverse().map((n) =>
    el('tr', {}, el('th', { scope: 'row' }, layerName(n)),
      pieces[n].map((tops, k) => cell(n, k, tops[0]))));
  const head = pieces[0].map((_, k) => el(
    first + k === state.token ? 'th.mono.chosen' : 'th.mono', { scope: 'col' }, piece(first + k)));
  show(config.n_layers, Math.max(state.token - first, 0));
  return el('div.picture.lens', {
    role: 'region', 'aria-label': 'Logit lens, arrow keys move', onkeydown: moveInTable,
  }, el('table', {}, el('thead', {}, el('tr', {}, el('th', {}, 'after'), head)),
    el('tbody', {}, rows)));
}

function showLayers() {
  const details = el('output.value', { 'aria-live': 'polite' });
  return [
    heading('Norm of the residual stream'),
    picture(normChart()),
    caption(`One line per token, ${piece(state.token)} in color; the scale is logarithmic.`),
    heading('Logit lens: the prediction after each layer'),
    details,
    lensTable(details),
    caption('A stronger color is a higher probability. The first layer is at the bottom.'),
  ];
}

function showLogits({ data: { top } }) {
  const { pieces, probabilities } = walk.predictions;
  return [
    heading(`The ten most probable tokens after ${piece(T - 1)}`),
    barPicture('The ten most probable tokens', top.map((t) => [t.piece, t.probability]), percent, 1),
    heading(`Predictions after position ${state.token}, ${piece(state.token)}`),
    probabilityBars('Predictions after the chosen token', pieces[state.token],
      probabilities[state.token]),
    outsideMap('norm', 'Output of the last norm'),
  ];
}

// Probabilities of the listed tokens among all tokens, then top-k and top-p as in the sampler.
function distribution({ temperature, topK, topP }) {
  const { logits, others } = walk.probabilities;
  const index = others.temperatures.findIndex((t) => Math.abs(t - temperature) < 1e-6);
  const rest = others.count ? others.log_sums[index] : -Infinity;
  const max = Math.max(logits[0] / temperature, rest);
  const powers = logits.map((z) => Math.exp(z / temperature - max));
  let unlisted = Math.exp(rest - max);
  const total = powers.reduce((a, b) => a + b, unlisted);
  const before = powers.map((p) => p / total);
  if (topK) unlisted = 0;
  const topped = before.map((p, i) => (topK && logits[i] < logits[topK - 1] ? 0 : p));
  const mass = topped.reduce((a, b) => a + b, unlisted / total);
  let [sum, kept] = [0, 0];
  const tied = (i) => i > 0 && logits[i] === logits[i - 1]; // with the last one: both are kept
  while (kept < topped.length && topped[kept] > 0 && (!kept || sum < topP * mass || tied(kept)))
    sum += topped[kept++];
  const open = topP === 1 ? unlisted > 0 : sum < topP * mass; // unlisted tokens are kept as well
  const final = topped.map((p, i) =>
    i < kept ? p / (open ? topP * mass : topP === 1 ? mass : sum) : 0);
  return { before, final, kept, open, unlisted: 1 - before.reduce((a, b) => a + b, 0) };
}

const LISTED = 16;

function drawDistribution(target) {
  const { before, final, kept, open, unlisted } = distribution(state);
  const { pieces, others: { count } } = walk.probabilities;
  const rows = pieces.slice(0, LISTED).map((name, i) => ({
    name, value: final[i], out: i >= kept,
    text: i < kept ? percent(final[i]) : `removed (${percent(before[i])})`,
  }));
  target.replaceChildren(
    bars('Probabilities', rows, 1),
    el('p', { id: 'kept', 'aria-live': 'polite' }, open
      ? `More than ${kept} tokens can be sampled, some of them not listed in this file.`
      : `${kept} of ${whole(config.vocab_size)} tokens can be sampled.`),
    count ? caption(`Before top-k and top-p the ${whole(count)} tokens that are not listed have a probability of ${percent(Math.max(unlisted, 0))} together.`) : '');
}

function showSampling({ data }) {
  const target = el('div', { id: 'distribution' });
  const { ids, pieces, others: { temperatures } } = walk.probabilities;
  const names = new Map(ids.map((id, i) => [id, pieces[i]]));
  const setting = (name, key, limits, show) =>
    slider(name, { ...limits, value: state[key], show }, (value) => {
      state[key] = value;
      drawDistribution(target);
    });
  drawDistribution(target);
  return [
    heading('Change the settings'),
    controls(
      setting('temperature', 'temperature',
        { min: temperatures[0], max: temperatures.at(-1), step: 0.1 }, (v) => v.toFixed(1)),
      setting('top-k', 'topK', { max: ids.length }, (v) => (v ? String(v) : 'off')),
      setting('top-p', 'topP', { min: 0.05, max: 1, step: 0.01 }, (v) => v.toFixed(2))),
    picture(target),
    heading(`Samples with the seeds 0 to ${data.draws.length - 1}, temperature ${data.temperature}, top-p ${data.top_p}`),
    picture(cells(data.draws.map((id, seed) =>
      el('span.cell.mono', {}, names.get(id) ?? `#${id}`, el('small', {}, `seed ${seed}`))))),
  ];
}

// One cell per token: in the cache, computed in this forward pass, or free.
function drawCache(target, continuation) {
  const all = [...walk.tokens, ...continuation].map((token) => token.piece);
  const filled = T + state.generated;
  const cached = state.generated ? filled - 1 : 0;
  const next = continuation[state.generated];
  const numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim;
  const cell = (name, i) => {
    const kind = i >= filled ? 'free' : i < cached ? 'cached' : 'computed';
    return el(`span.cell.mono.${kind}`, {}, i < filled ? name : '·', el('small', {}, kind));
  };
  const result = next ? `; the result is ${next.piece} (${percent(next.probability)})` : '';
  target.replaceChildren(
    cells(all.slice(0, -1).map(cell)),
    el('p', { id: 'cached', 'aria-live': 'polite' },
      `${cached} tokens from the cache, ${filled - cached} computed${result}. The cache has ${whole(filled * numbers)} numbers: 2 × ${config.n_layers} layers × ${config.n_kv_heads} KV heads × ${config.head_dim} per token.`));
}

function showCache({ data: { continuation } }) {
  const target = el('div');
  const most = Math.max(continuation.length - 1, 0);
  const generated = slider('generated tokens', { max: most, value: state.generated }, (n) => {
    state.generated = n;
    drawCache(target, continuation);
  });
  const input = generated.querySelector('input');
  const onclick = () => {
    input.value = (Number(input.value) + 1) % (most + 1);
    input.dispatchEvent(new Event('input'));
  };
  drawCache(target, continuation);
  return [
    heading('Keys and values by token'),
    controls(generated, button('button', { onclick }, 'next token')),
    picture(target),
  ];
}

function showQuantization({ data }) {
  const head = ['type', 'bits', 'error of weights', 'of output', 'largest logit change',
    'KL divergence, bits'];
  return [
    heading(`${data.matrix}, quantized`),
    picture(table(head,
      data.types.map((t) => [t.type, t.bits, t.weights, t.output, t.logits, t.divergence]))),
    barPicture('Error of the weights', data.types.map((t) => [t.type, t.weights]), percent),
  ];
}

const showTime = ({ data }) => [
  heading('Time by part'),
  barPicture('Time by part', Object.entries(data.seconds), (s) => `${(1000 * s).toFixed(1)} ms`),
];

function showMistake(done) {
  const run = (title, { predictions, continuation, weights }) => el('section', {},
    heading(`${title}: predictions after ${piece(state.token)}`),
    probabilityBars(title, predictions.pieces[state.token], predictions.probabilities[state.token]),
    el('p', {}, 'continues: ', el('code', {}, continuation.pieces.join(''))),
    weightsMap(`attention weights, ${title}`, matrix(weights)));
  return [
    heading('KL divergence of the predictions, in bits'),
    barPicture('KL divergence', done.divergence_bits.map((value, t) => [piece(t), value]), exact),
    run('correct model', done.correct),
    run('wrong model', done.wrong),
  ];
}
