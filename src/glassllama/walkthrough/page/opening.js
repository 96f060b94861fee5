// Pictures of steps 0 to 4 and of what stands around the model: text, ids, file, settings.

const hex = (byte) => byte.toString(16).padStart(2, '0');

const chip = (title, below) =>
  el('span', { class: 'chip' }, el('b', { class: 'mono' }, title), el('code', {}, below));

function tokenChips(below) {
  return picture(
    el(
      'div',
      { class: 'chips' },
      walk.tokens.map((token) => chip(token.piece, below(token))),
    ),
  );
}

const showPrompt = () => [
  heading('Every token and its bytes'),
  tokenChips((token) => (token.bytes ? token.bytes.map(hex).join(' ') : 'a special token')),
];

function showIds(step) {
  const merges = step.data.merges ?? [];
  return [
    heading('Tokens and their ids'),
    tokenChips((token) => whole(token.id)),
    ...(merges.length
      ? [
          heading('One word, merged pair by pair'),
          picture(
            merges.map((parts) =>
              el(
                'div',
                { class: 'cells' },
                String(parts)
                  .split(' ')
                  .map((part) => el('span', { class: 'cell mono' }, part)),
              ),
            ),
          ),
        ]
      : []),
  ];
}

function showFile(step) {
  const { bytes, tensor } = step.data;
  return [
    heading('What fills the file'),
    picture(
      bars(
        'Bytes by part',
        Object.entries(bytes).map(([name, value]) => ({
          name,
          value,
          text: `${(value / 1e6).toFixed(1)} MB`,
        })),
      ),
    ),
    heading('The tensor that was read'),
    picture(
      table(
        ['', ''],
        Object.entries(tensor).map(([name, value]) => [
          name,
          Array.isArray(value)
            ? value.join(' × ')
            : typeof value === 'number'
              ? whole(value)
              : String(value),
        ]),
      ),
    ),
  ];
}

const showConfig = (step) => [
  heading('All settings'),
  picture(
    table(
      ['setting', 'value'],
      Object.entries(step.data.config).map(([name, value]) => [
        name,
        typeof value === 'number' && Number.isInteger(value) ? whole(value) : String(value),
      ]),
    ),
  ),
];

const showEmbedding = () => [
  heading('A row for every token'),
  caption(`tok_embeddings: ${ends.tok_embeddings.shape.join(' × ')}`),
  heatmap('tok_embeddings', matrix(ends.tok_embeddings)),
];

const showBits = (step) => [
  heading(`${step.data.place}, rounded`),
  picture(
    table(
      [
        'kind',
        'bits',
        'error of weights',
        'of output',
        'largest move of a logit',
        'divergence, bits',
      ],
      step.data.kinds.map((k) => [k.kind, k.bits, k.weights, k.output, k.logits, k.divergence]),
    ),
  ),
  picture(
    bars(
      'Error of the weights',
      step.data.kinds.map((k) => ({ name: k.kind, value: k.weights, text: percent(k.weights) })),
    ),
  ),
];

const showTime = (step) => [
  heading('Seconds by part'),
  picture(
    bars(
      'Seconds by part',
      Object.entries(step.data.seconds).map(([name, value]) => ({
        name,
        value,
        text: `${(1000 * value).toFixed(1)} ms`,
      })),
    ),
  ),
];
