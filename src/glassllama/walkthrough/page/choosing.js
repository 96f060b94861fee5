// Steps 14 and 15, and what breaks: sampling with its sliders, the cache, right beside wrong.

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
  const tied = (i) => i > 0 && logits[i] === logits[i - 1]; // as the last one kept: it stays, too
  while (kept < alive.length && alive[kept] > 0 && (!kept || sum < topP * mass || tied(kept)))
    sum += alive[kept++];
  const open = topP === 1 ? beyond > 0 : sum < topP * mass; // the cut lies among tokens that are not listed
  const final = alive.map((p, i) =>
    i < kept ? p / (open ? topP * mass : topP === 1 ? mass : sum) : 0,
  );
  return { before, final, kept, open, beyond: 1 - before.reduce((a, b) => a + b, 0) };
}

const LISTED = 16;

function drawDistribution(target) {
  const { before, final, kept, open, beyond } = distribution(state);
  const rows = walk.probabilities.pieces
    .slice(0, LISTED)
    .map((name, i) => ({
      name,
      value: final[i],
      text: i < kept ? percent(final[i]) : `cut (${percent(before[i])})`,
      out: i >= kept,
    }));
  target.replaceChildren(
    bars('Probabilities', rows, 1),
    el(
      'p',
      { id: 'kept', 'aria-live': 'polite' },
      open
        ? `More than ${kept} tokens can be drawn, some of them not listed in this file.`
        : `${kept} of ${whole(config.vocab_size)} tokens can be drawn.`,
    ),
    walk.probabilities.others.count
      ? caption(
          `Before the cuts the ${whole(walk.probabilities.others.count)} tokens that are not listed here have ${percent(Math.max(beyond, 0))} together.`,
        )
      : '',
  );
}

function showSampling(step) {
  const target = el('div', { id: 'distribution' });
  const set = (name) => (value) => {
    state[name] = value;
    drawDistribution(target);
  };
  const grid = walk.probabilities.others.temperatures;
  const most = walk.probabilities.ids.length;
  drawDistribution(target);
  const named = new Map(walk.probabilities.ids.map((id, i) => [id, walk.probabilities.pieces[i]]));
  return [
    heading('Try it'),
    controls(
      slider(
        'temperature',
        {
          min: grid[0],
          max: grid.at(-1),
          step: 0.1,
          value: state.temperature,
          show: (v) => v.toFixed(1),
        },
        set('temperature'),
      ),
      slider(
        'top-k',
        { min: 0, max: most, value: state.topK, show: (v) => (v ? String(v) : 'off') },
        set('topK'),
      ),
      slider(
        'top-p',
        { min: 0.05, max: 1, step: 0.01, value: state.topP, show: (v) => v.toFixed(2) },
        set('topP'),
      ),
    ),
    picture(target),
    heading(
      `What the seeds 0 to ${step.data.draws.length - 1} draw at temperature ${step.data.temperature}, top-p ${step.data.top_p}`,
    ),
    picture(
      el(
        'div',
        { class: 'cells' },
        step.data.draws.map((id, seed) =>
          el(
            'span',
            { class: 'cell mono' },
            named.get(id) ?? `#${id}`,
            el('small', {}, `seed ${seed}`),
          ),
        ),
      ),
    ),
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
    el(
      'div',
      { class: 'cells' },
      all.slice(0, -1).map((name, i) => {
        const kind = i >= fed ? 'empty' : i < kept ? 'kept' : 'new';
        return el(
          'span',
          { class: `cell mono ${kind}` },
          i < fed ? name : '·',
          el('small', {}, { empty: 'free', kept: 'cached', new: 'computed' }[kind]),
        );
      }),
    ),
    el(
      'p',
      { id: 'cached', 'aria-live': 'polite' },
      `${kept} tokens from the cache, ${fed - kept} computed${next ? `; out comes ${next.piece} (${percent(next.probability)})` : ''}. The cache holds ${whole(fed * numbers)} numbers: 2 × ${config.n_layers} layers × ${config.n_kv_heads} heads × ${config.head_dim} a token.`,
    ),
  );
}

function showCache(step) {
  const made = step.data.continuation;
  const target = el('div');
  const most = Math.max(made.length - 1, 0);
  const go = slider('tokens made', { min: 0, max: most, value: state.made }, (n) => {
    state.made = n;
    drawCache(target, made);
  });
  const input = go.querySelector('input');
  const more = el(
    'button',
    {
      type: 'button',
      onclick: () => {
        input.value = (Number(input.value) + 1) % (most + 1);
        input.dispatchEvent(new Event('input'));
      },
    },
    'next token',
  );
  drawCache(target, made);
  return [heading('Keys and values, token by token'), controls(go, more), picture(target)];
}

function showExperiment(done) {
  const side = (name, made) =>
    el(
      'section',
      {},
      heading(`${name}: expected after ${piece(state.token)}`),
      picture(
        bars(
          name,
          made.predictions.pieces[state.token].map((text, i) => ({
            name: text,
            value: made.predictions.probabilities[state.token][i],
            text: percent(made.predictions.probabilities[state.token][i]),
          })),
          1,
        ),
      ),
      el('p', {}, 'goes on: ', el('code', {}, made.continuation.pieces.join(''))),
      heatmap(`attention, ${name}`, matrix(made.weights), {
        limit: 1,
        columnName: (c) => `listens to ${piece(c)}`,
      }),
    );
  return [
    heading('Bits between right and wrong'),
    picture(
      bars(
        'Divergence',
        done.divergence_bits.map((value, t) => ({ name: piece(t), value })),
      ),
    ),
    side('right', done.right),
    side('wrong', done.wrong),
  ];
}
