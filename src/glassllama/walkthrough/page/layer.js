// Pictures of one layer: norm, heads, attention, and the gates of SwiGLU.

const layerSlider = () =>
  config.n_layers > 1
    ? slider('layer', { min: 0, max: config.n_layers - 1, value: state.layer }, (n) =>
        change({ layer: n }, 'layer'),
      )
    : null;
const headSlider = () =>
  config.n_heads > 1
    ? slider('head', { min: 0, max: config.n_heads - 1, value: state.head }, (n) =>
        change({ head: n }, 'head'),
      )
    : null;

const showNorm = () => [
  controls(layerSlider()),
  ...tensors([
    ['input', 'What enters the layer'],
    ['attention_norm', 'Every row brought to the same size'],
  ]),
];

const showHeads = () => [
  controls(layerSlider(), headSlider()),
  ...tensors([
    ['attention.q', 'q: what a token looks for'],
    ['attention.k', 'k: what it can be found by'],
    ['attention.v', 'v: what it holds'],
  ]),
];

// Query heads above, the heads of keys and values that they share below.
function showGroups() {
  const [heads, groups] = [config.n_heads, config.n_kv_heads];
  const width = Math.max(heads * 34, 340);
  const x = (i, count) => ((i + 0.5) * width) / count;
  const mine = Math.floor(state.head / config.group_size);
  const drawing = svg('svg', {
    viewBox: `0 0 ${width} 170`,
    width,
    role: 'group',
    'aria-label': `${heads} query heads share ${groups} heads of keys and values`,
  });
  for (let h = 0; h < heads; h++) {
    const g = Math.floor(h / config.group_size);
    drawing.append(
      svg('line', {
        class: h === state.head ? 'wire chosen' : 'wire',
        x1: x(h, heads),
        y1: 48,
        x2: x(g, groups),
        y2: 118,
      }),
    );
  }
  const node = (i, count, y, chosen, text, label, head) => {
    const pick = () => change({ head }, `node ${y} ${i}`);
    drawing.append(
      svg(
        'g',
        {
          role: 'button',
          tabindex: 0,
          'aria-label': label,
          'aria-pressed': chosen,
          'data-focus': `node ${y} ${i}`,
          onclick: pick,
          onkeydown: (event) => {
            if (event.key === 'Enter' || event.key === ' ') {
              event.preventDefault();
              pick();
            }
          },
        },
        svg('circle', { class: chosen ? 'node chosen' : 'node', cx: x(i, count), cy: y, r: 14 }),
        svg('text', { x: x(i, count), y: y + 4, 'text-anchor': 'middle' }, text),
      ),
    );
  };
  for (let h = 0; h < heads; h++)
    node(h, heads, 34, h === state.head, `q${h}`, `query head ${h}`, h);
  for (let g = 0; g < groups; g++)
    node(g, groups, 132, g === mine, `kv${g}`, `kv head ${g}`, g * config.group_size);
  return [
    controls(headSlider()),
    picture(drawing),
    caption(
      `Query head ${state.head} asks kv head ${mine}. Groups of ${config.group_size}: the cache is ${config.group_size} times smaller than with a head of keys for each query head.`,
    ),
    ...tensors([['attention.k', 'The keys of the group']]),
  ];
}

function showAttention() {
  const heads = walk.attention.weights[state.layer];
  if (!heads)
    return [
      controls(layerSlider()),
      el(
        'p',
        { class: 'note' },
        `Of a prompt this long the maps of layer ${walk.layer} alone are kept.`,
      ),
    ];
  const maps = el('div', {
    class: 'maps',
    role: 'group',
    'aria-label': `Attention of all heads of layer ${state.layer}`,
  });
  heads.forEach((flat, h) => {
    const canvas = el('canvas', { 'aria-hidden': 'true' });
    paint(canvas, lower(flat), 1);
    const bits = walk.attention.entropy_bits[state.layer][h][state.token];
    maps.append(
      el(
        'button',
        {
          type: 'button',
          'aria-pressed': h === state.head,
          'data-focus': `head ${h}`,
          'aria-label': `head ${h}, ${exact(bits)} bits`,
          onclick: () => change({ head: h }, `head ${h}`),
        },
        `head ${h} · ${bits.toFixed(1)} bits`,
        canvas,
      ),
    );
  });
  const own = lower(heads[state.head]);
  const row = [...Array(state.token + 1).keys()].map((c) => ({
    name: piece(c),
    value: own.at(state.token, c),
    text: percent(own.at(state.token, c)),
  }));
  return [
    controls(layerSlider(), headSlider()),
    picture(maps),
    caption(
      'A row listens, a column is listened to. Bits: how widely the chosen token spreads its attention.',
    ),
    heading(`Layer ${state.layer}, head ${state.head}`),
    heatmap('attention.weights', own, {
      limit: 1,
      column: state.token,
      columnName: (c) => `listens to ${piece(c)}`,
    }),
    heading(`Whom ${piece(state.token)} listens to`),
    picture(bars('Attention weights', row, 1)),
    ...(walk.layers[state.layer]
      ? [
          heading('Scores, before mask and softmax'),
          heatmap(
            'attention.scores',
            matrix(walk.layers[state.layer]['attention.scores'], state.head),
            { columnName: (c) => `meets the key of ${piece(c)}` },
          ),
        ]
      : []),
  ];
}

const showResidual = (step) => [
  controls(layerSlider(), headSlider()),
  ...(state.layer === walk.layer
    ? [
        heading(`How much each head adds to ${piece(T - 1)}`),
        picture(
          bars(
            'Length added by each head',
            step.data.head_shares.map((value, h) => ({ name: `head ${h}`, value })),
          ),
        ),
      ]
    : []),
  ...tensors([
    ['attention.heads', 'The weighted sums'],
    ['attention.wo', 'Through wo: what is added'],
    ['after_attention', 'The residual stream now'],
  ]),
];

const silu = (z) => z / (1 + Math.exp(-z));

const BINS = 60;

// How many gates lie in each of the equal parts of -high … high.
function counted(gates, high) {
  const counts = new Array(BINS).fill(0);
  for (const z of gates) counts[clamp(Math.floor((BINS * (z + high)) / (2 * high)), 0, BINS - 1)]++;
  return counts;
}

// The curve of silu, and below it how many features of the chosen token lie where.
function gateCurve(gates) {
  const high = Math.max(2, ...gates.map(Math.abs));
  const [x, y] = [(z) => 160 + (150 * z) / high, (v) => 145 - (135 * v) / high];
  const line = [...Array(121).keys()]
    .map((i) => high * (i / 60 - 1))
    .map((z) => `${x(z)},${y(silu(z))}`)
    .join(' ');
  const drawing = svg(
    'svg',
    {
      viewBox: '0 0 320 250',
      width: 480,
      role: 'img',
      'aria-label': `silu of ${gates.length} gates; largest ${exact(Math.max(...gates))}`,
    },
    svg('line', { class: 'grid', x1: 5, x2: 315, y1: y(0), y2: y(0) }),
    svg('line', { class: 'grid', x1: x(0), x2: x(0), y1: 5, y2: 175 }),
    svg('polyline', { class: 'wire chosen', points: line }),
  );
  const counts = counted(gates, high);
  const most = Math.max(...counts);
  counts.forEach((count, i) =>
    drawing.append(
      svg('rect', {
        class: 'count',
        x: 10 + (300 * i) / BINS,
        width: 300 / BINS - 0.6,
        y: 232 - (50 * count) / most,
        height: (50 * count) / most,
      }),
    ),
  );
  for (const z of [-high, 0, high])
    drawing.append(
      svg(
        'text',
        { class: 'quiet', x: x(z), y: 246, 'text-anchor': z < 0 ? 'start' : z ? 'end' : 'middle' },
        exact(z),
      ),
    );
  drawing.append(
    svg('text', { class: 'quiet', x: 8, y: y(0) - 5 }, 'shut'),
    svg('text', { class: 'quiet', x: 285, y: y(0) - 5 }, 'open'),
  );
  return drawing;
}

function showGates() {
  const layer = walk.layers[state.layer];
  const slots = controls(layerSlider());
  if (!layer) return [slots, missing()];
  const [gate, up, gated] = ['gate', 'up', 'gated'].map((name) =>
    matrix(layer[`feed_forward.${name}`]),
  );
  const all = [...Array(gate.columns).keys()];
  const loud = [...all]
    .sort((a, b) => Math.abs(gated.at(state.token, b)) - Math.abs(gated.at(state.token, a)))
    .slice(0, 8);
  return [
    slots,
    heading(`The gates of ${piece(state.token)}`),
    picture(gateCurve(all.map((c) => gate.at(state.token, c)))),
    caption(
      'The curve is silu. Below it, how many features have their gate where: on the left shut, on the right open.',
    ),
    heading('The loudest features'),
    picture(
      table(
        ['feature', 'gate', 'silu(gate)', 'up', 'silu(gate) × up'],
        loud.map((c) => [
          String(c),
          gate.at(state.token, c),
          silu(gate.at(state.token, c)),
          up.at(state.token, c),
          gated.at(state.token, c),
        ]),
      ),
    ),
    ...tensors([
      ['feed_forward.gate', 'gate'],
      ['feed_forward.up', 'up'],
      ['feed_forward.gated', 'silu(gate) × up'],
      ['feed_forward.down', 'Through down: what is added'],
      ['output', 'The residual stream after the layer'],
    ]),
  ];
}
