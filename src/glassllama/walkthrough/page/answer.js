// Pictures of steps 12 and 13: all layers and the logits.

function normChart() {
  const [width, height, left] = [560, 190, 44];
  const logs = walk.residual_norms.map((row) => row.map((v) => Math.log10(Math.max(v, 1e-6))));
  const [low, high] = [Math.floor(Math.min(...logs.flat())), Math.ceil(Math.max(...logs.flat()))];
  const x = (n) => left + ((width - left - 10) * n) / config.n_layers;
  const y = (v) => height - 22 - ((height - 32) * (v - low)) / Math.max(high - low, 1);
  const drawing = svg('svg', {
    viewBox: `0 0 ${width} ${height}`,
    width: 720,
    role: 'img',
    'aria-label': `Length of the residual stream, from ${exact(walk.residual_norms[0][state.token])} to ${exact(walk.residual_norms.at(-1)[state.token])} for ${piece(state.token)}`,
  });
  for (let d = low; d <= high; d++)
    drawing.append(
      svg('line', { class: 'grid', x1: left, x2: width, y1: y(d), y2: y(d) }),
      svg(
        'text',
        { class: 'quiet', x: left - 5, y: y(d) + 4, 'text-anchor': 'end' },
        d < 5 ? exact(10 ** d) : `1e${d}`,
      ),
    );
  const line = (t) =>
    drawing.append(
      svg('polyline', {
        class: t === state.token ? 'wire chosen' : 'wire',
        points: logs.map((row, n) => `${x(n)},${y(row[t])}`).join(' '),
      }),
    );
  for (let t = 0; t < T; t++) if (t !== state.token) line(t);
  line(state.token);
  for (const n of [0, Math.round(config.n_layers / 2), config.n_layers])
    drawing.append(
      svg(
        'text',
        { class: 'quiet', x: x(n), y: height - 5, 'text-anchor': n ? 'end' : 'start' },
        n ? `layer ${n - 1}` : 'embedding',
      ),
    );
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
  const tell = (n, k) =>
    details.replaceChildren(
      `${layerName(n)}, after ${piece(first + k)}: ${pieces[n][k].map((p, i) => `${p} ${percent(probabilities[n][k][i])}`).join(', ')}`,
    );
  const body = el('tbody');
  for (let n = config.n_layers; n >= 0; n--) {
    body.append(
      el(
        'tr',
        {},
        el('th', { scope: 'row' }, layerName(n)),
        pieces[n].map((tops, k) => {
          const cell = el(
            'td',
            {},
            el(
              'button',
              {
                type: 'button',
                class: 'mono',
                tabindex: n === config.n_layers && first + k === T - 1 ? 0 : -1,
                'aria-label': `${layerName(n)}, after ${piece(first + k)}: ${tops[0]}, ${percent(probabilities[n][k][0])}`,
                onclick: () => tell(n, k),
                onmouseenter: () => tell(n, k),
                onfocus: () => tell(n, k),
              },
              tops[0],
            ),
          );
          tinted(cell, colour(0.7 * probabilities[n][k][0]));
          return cell;
        }),
      ),
    );
  }
  const last = Math.max(state.token - first, 0);
  tell(config.n_layers, last);
  return el(
    'div',
    {
      class: 'picture lens',
      role: 'region',
      'aria-label': 'Logit lens, arrow keys move',
      onkeydown: moveInTable,
    },
    el(
      'table',
      {},
      el(
        'thead',
        {},
        el(
          'tr',
          {},
          el('th', {}, 'after'),
          pieces[0].map((_, k) =>
            el(
              'th',
              { scope: 'col', class: first + k === state.token ? 'mono chosen' : 'mono' },
              piece(first + k),
            ),
          ),
        ),
      ),
      body,
    ),
  );
}

function showLayers() {
  const details = el('output', { class: 'value', 'aria-live': 'polite' });
  return [
    heading('How long the residual stream is'),
    picture(normChart()),
    caption(`A line for each token, ${piece(state.token)} in colour; the scale is logarithmic.`),
    heading('Logit lens: what each layer would say'),
    details,
    lensTable(details),
    caption('The stronger the colour, the surer. Read a column from the bottom up.'),
  ];
}

function showLogits(step) {
  const { pieces, probabilities } = walk.predictions;
  return [
    heading(`Ten likeliest after ${piece(T - 1)}`),
    picture(
      bars(
        'Ten likeliest',
        step.data.top.map((top) => ({
          name: top.piece,
          value: top.probability,
          text: percent(top.probability),
        })),
        1,
      ),
    ),
    heading(`Expected after position ${state.token}, ${piece(state.token)}`),
    picture(
      bars(
        'Expected after the chosen token',
        pieces[state.token].map((name, i) => ({
          name,
          value: probabilities[state.token][i],
          text: percent(probabilities[state.token][i]),
        })),
        1,
      ),
    ),
    heading('The last norm'),
    heatmap('norm', matrix(ends.norm)),
  ];
}
