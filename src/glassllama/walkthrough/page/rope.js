// Step 8: hands that turn with the position, and one pair of numbers before and after.

// Where the two coordinates of a pair lie: neighbours, or one in each half.
const coordinates = (i) =>
  config.rope_layout === 'interleaved' ? [2 * i, 2 * i + 1] : [i, i + config.head_dim / 2];

const turnBy = (angle) => `rotate(${(-angle * 180) / Math.PI})`;

// From the middle to the right, `tip` wide at its point.
const arrowOf = (length, tip) =>
  `M0 0H${length}M${length - 1.4 * tip} ${-tip}L${length} 0L${length - 1.4 * tip} ${tip}`;

function clock(i, angle) {
  const hand = svg('path', { class: 'hand', d: arrowOf(15, 4) });
  hand.style.transform = `rotate(${-angle}rad)`;
  return el(
    'button',
    {
      type: 'button',
      'aria-pressed': i === state.pair,
      'aria-label': `pair ${i}: ${exact(angle)} radians`,
      'data-focus': `clock ${i}`,
      'data-clock': i,
      onclick: () => change({ pair: i }, `clock ${i}`),
    },
    svg(
      'svg',
      { viewBox: '-20 -20 40 40', width: 40, height: 40, 'aria-hidden': 'true' },
      svg('circle', { class: 'ring', r: 17 }),
      hand,
    ),
    `pair ${i}`,
  );
}

function showRope() {
  const angles = matrix(walk.angles);
  const angle = angles.at(state.token, state.pair);
  const clocks = el('div', { class: 'clocks' });
  for (let i = 0; i < angles.columns; i++) clocks.append(clock(i, angles.at(state.token, i)));
  return [
    controls(
      slider(
        'position',
        { min: 0, max: T - 1, value: state.token, show: (t) => `${t} ${piece(t)}` },
        turnClocks,
      ),
      headSlider(),
    ),
    caption(
      'Every pair of coordinates is a hand. Move the position: the first hands race, the last ones hardly stir.',
    ),
    picture(clocks),
    ...turnedPair(angle),
    ...tensors([
      ['attention.q', 'q before'],
      ['attention.q_rope', 'q after'],
    ]),
  ];
}

// The hands of this very page turn, so that the eye can follow them; the rest is drawn anew.
function turnClocks(t) {
  change({ token: t }, 'position', () => {
    for (const button of document.querySelectorAll('[data-clock]')) {
      const angle = matrix(walk.angles).at(t, Number(button.dataset.clock));
      button.querySelector('.hand').style.transform = `rotate(${-angle}rad)`;
      button.setAttribute('aria-label', `pair ${button.dataset.clock}: ${exact(angle)} radians`);
    }
    const pair = document.getElementById('pair');
    if (pair) pair.replaceWith(...turnedPair(matrix(walk.angles).at(t, state.pair)));
  });
}

function turnedPair(angle) {
  const layer = walk.layers[state.layer];
  if (!layer) return [];
  const [a, b] = coordinates(state.pair);
  const read = (place) => [a, b].map((c) => matrix(layer[place], state.head).at(state.token, c));
  const [before, after] = [read('attention.q'), read('attention.q_rope')];
  const size = Math.max(Math.hypot(...before), Math.hypot(...after), 1e-9) / 70;
  const arrow = ([x, y], kind) =>
    svg('path', {
      class: kind,
      d: arrowOf(Math.hypot(x, y) / size, 5),
      transform: turnBy(Math.atan2(y, x)),
      'stroke-width': 3,
    });
  return [
    el(
      'div',
      { id: 'pair', class: 'picture side' },
      svg(
        'svg',
        {
          viewBox: '-90 -90 180 180',
          width: 180,
          role: 'img',
          'aria-label': `the pair before and after it is turned by ${exact(angle)} radians`,
        },
        svg('circle', { class: 'ring', r: 70 }),
        svg('line', { class: 'grid', x1: -85, x2: 85 }),
        svg('line', { class: 'grid', y1: -85, y2: 85 }),
        arrow(before, 'before'),
        arrow(after, 'hand'),
      ),
      el(
        'div',
        {},
        el(
          'p',
          {},
          `Pair ${state.pair} of q, head ${state.head}, at position ${state.token} (${piece(state.token)}), coordinates ${a} and ${b}:`,
        ),
        el('p', { class: 'mono' }, `before  ${exact(before[0])}, ${exact(before[1])}`),
        el(
          'p',
          { class: 'mono' },
          `turned by ${exact(angle)} radians${config.qk_norm ? ', head brought to one length' : ''}`,
        ),
        el('p', { class: 'mono' }, `after   ${exact(after[0])}, ${exact(after[1])}`),
      ),
    ),
  ];
}
