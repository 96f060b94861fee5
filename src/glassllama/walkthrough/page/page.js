// The page itself: the map, the tokens, the chosen step, and the keys.

const VIEWS = {
  prompt: showPrompt,
  ids: showIds,
  file: showFile,
  config: showConfig,
  embedding: showEmbedding,
  norm: showNorm,
  qkv: showHeads,
  groups: showGroups,
  rope: showRope,
  attention: showAttention,
  residual: showResidual,
  swiglu: showGates,
  layers: showLayers,
  logits: showLogits,
  sampling: showSampling,
  cache: showCache,
  quantisation: showBits,
  time: showTime,
};
const FIRST = ['prompt', 'ids'];
const INSIDE = ['norm', 'qkv', 'groups', 'rope', 'attention', 'residual', 'swiglu'];
const AFTER = ['layers', 'logits', 'sampling', 'cache'];
const ADDS = ['residual', 'swiglu'];
const SHORT = {
  prompt: 'Text and bytes',
  ids: 'Ids',
  file: 'The file',
  config: 'Configuration',
  embedding: 'Embedding',
  norm: 'RMSNorm',
  qkv: 'q, k, v',
  groups: 'Heads, groups',
  rope: 'RoPE',
  attention: 'Attention',
  residual: 'wo, residual',
  swiglu: 'SwiGLU, residual',
  layers: 'All layers',
  logits: 'Norm, logits',
  sampling: 'Sampling',
  cache: 'Cache',
  quantisation: 'Fewer bits',
  time: 'Time',
};

// A step of the walk, or an experiment dressed as one.
const steps = [
  ...walk.steps.map((step) => ({ ...step, draw: () => VIEWS[step.name](step) })),
  ...walk.experiments.map((done, i) => ({
    number: walk.steps.length + i,
    name: done.name,
    title: done.title,
    question: 'What breaks?',
    shapes: '',
    sources: [done.source],
    text: [].concat(done.explanation),
    checks: [done.check],
    numbers: [],
    picture: [],
    what_if: null,
    draw: () => showExperiment(done),
  })),
];

const byId = (id) => document.getElementById(id);

function stepButton(step) {
  return el(
    'button',
    {
      type: 'button',
      'data-step': step.number,
      class: ADDS.includes(step.name) ? 'adds' : null,
      title: step.title,
      onclick: () => change({ step: step.number }),
    },
    el('span', { class: 'number' }, String(step.number)),
    SHORT[step.name] ?? step.title,
  );
}

// All steps in the order of their numbers: those of a forward pass along a line, others beside dots.
function drawMap() {
  const chosen = (wanted) => steps.filter((step) => wanted(step.name)).map(stepButton);
  const named = (...names) => chosen((name) => names.includes(name));
  const stream = (...children) => el('div', { class: 'stream' }, ...children);
  const around = (title, ...children) =>
    el('div', { class: 'around' }, el('p', { class: 'caption' }, title), ...children);
  const experiments = chosen((name) => !(name in VIEWS));
  byId('map').replaceChildren(
    stream(named(...FIRST)),
    around('what the model is', named('file', 'config')),
    stream(
      named('embedding'),
      el(
        'div',
        { class: 'layer' },
        el('p', { class: 'caption' }, `a layer, ${config.n_layers} times`),
        named(...INSIDE),
      ),
      named(...AFTER),
    ),
    around('what it costs', named('quantisation', 'time')),
    ...(experiments.length ? [around('what breaks', experiments)] : []),
  );
}

// Tokens, tinted by how much the chosen one listens to them while attention is shown.
function drawTokens() {
  const flat =
    steps[state.step].name === 'attention'
      ? walk.attention.weights[state.layer]?.[state.head]
      : null;
  const tint = palette();
  byId('tokens').replaceChildren(
    ...walk.tokens.map((token, t) => {
      const chosen = t === state.token;
      const button = el(
        'button',
        {
          type: 'button',
          role: 'radio',
          'aria-checked': chosen,
          tabindex: chosen ? 0 : -1,
          'data-focus': `token ${t}`,
          class: 'mono',
          onclick: () => change({ token: t }, `token ${t}`),
        },
        token.piece,
        el('small', {}, `${t} · ${token.id}`),
      );
      if (flat && t < state.token) tinted(button, tint(lower(flat).at(state.token, t)));
      return button;
    }),
  );
  const strip = byId('tokens');
  const chosen = strip.children[state.token];
  strip.scrollLeft = chosen.offsetLeft - (strip.clientWidth - chosen.offsetWidth) / 2;
}

const sourceOf = (source) => [
  el('p', { class: 'source mono' }, `${source.file}, line ${source.line}: ${source.name}`),
  el('pre', { tabindex: 0 }, el('code', {}, source.lines.join('\n'))),
];

const checkOf = (check) =>
  el(
    'p',
    { class: check.relative > check.allowed ? 'check warns' : 'check' },
    check.relative > check.allowed
      ? `! ${check.what}: differs from the running model by ${exact(check.error)} (relative ${exact(check.relative)}, rounding explains ${exact(check.allowed)})`
      : check.allowed
      ? `✓ ${check.what}: equal to the running model, largest difference ${exact(check.error)} (relative ${exact(check.relative)}, allowed ${exact(check.allowed)})`
      : `✓ ${check.what}: equal`,
  );

// What was worked out by hand on the way, begun.
const numbersOf = (numbers) =>
  picture(
    table(
      ['', 'shape', 'the first numbers'],
      numbers.map(({ name, shape, first }) => [
        name,
        shape.join(' × '),
        el('code', {}, first.map(exact).join('  ')),
      ]),
    ),
  );

function drawStep() {
  watcher.disconnect();
  const step = steps[state.step];
  const other = state.layer !== walk.layer && INSIDE.includes(step.name);
  const drawn = step.picture.join('\n').trim();
  byId('step').replaceChildren(
    ...[
      el('h2', { id: 'title' }, `${step.number}. ${step.title}`),
      el('p', { class: 'question' }, step.question),
      step.shapes ? el('p', {}, el('code', { class: 'shapes' }, step.shapes)) : null,
      step.text.map((text) => el('p', {}, text)),
      other
        ? el(
            'p',
            { class: 'note' },
            `The words and checks here are of layer ${walk.layer}; the pictures show layer ${state.layer}.`,
          )
        : null,
      step.draw(),
      step.numbers.length ? [heading('By hand'), numbersOf(step.numbers)] : [],
      heading('The lines that compute it'),
      step.sources.flatMap(sourceOf),
      heading('Checked'),
      step.checks.map(checkOf),
      step.what_if
        ? [
            heading('What if …'),
            el('p', {}, step.what_if.shows),
            el('pre', { tabindex: 0 }, el('code', {}, step.what_if.command)),
          ]
        : [],
      drawn
        ? el(
            'details',
            {},
            el('summary', {}, 'As the terminal draws it'),
            el('pre', { tabindex: 0 }, drawn),
          )
        : null,
      el(
        'div',
        { class: 'steps' },
        el(
          'button',
          {
            type: 'button',
            'data-focus': 'back',
            disabled: state.step === 0 ? '' : null,
            onclick: () => change({ step: state.step - 1 }, 'back'),
          },
          '← back',
        ),
        el(
          'button',
          {
            type: 'button',
            'data-focus': 'next',
            disabled: state.step === steps.length - 1 ? '' : null,
            onclick: () => change({ step: state.step + 1 }, 'next'),
          },
          'next →',
        ),
      ),
    ]
      .flat(2)
      .filter((part) => part !== null),
  );
  const column = document.querySelector('.lens .chosen');
  if (column)
    column.closest('.lens').scrollLeft =
      column.offsetLeft - column.closest('.lens').clientWidth / 2;
}

function markStep() {
  for (const button of document.querySelectorAll('[data-step]')) {
    if (Number(button.dataset.step) === state.step) button.setAttribute('aria-current', 'step');
    else button.removeAttribute('aria-current');
  }
  const current = document.querySelector('[aria-current=step]');
  const map = byId('map');
  if (map.scrollWidth > map.clientWidth) // a strip, on a narrow screen
    map.scrollLeft += current.getBoundingClientRect().left - (map.clientWidth - current.offsetWidth) / 2;
  document.title = `${steps[state.step].title} · glassllama`;
}

// Take what the reader chose, draw it, and leave the focus where it was. `draw`: a lesser redrawing.
function change(chosen, focus, draw = drawStep) {
  const turned = 'step' in chosen && chosen.step !== state.step;
  Object.assign(state, chosen);
  drawTokens();
  draw();
  markStep();
  const again =
    focus && document.querySelector(`[data-focus="${focus}"], [data-slider="${focus}"]`);
  if (again) again.focus({ preventScroll: true });
  if (turned) byId('said').textContent = `Step ${state.step}: ${steps[state.step].title}`;
  if (turned && scrollY > byId('step').offsetTop) byId('step').scrollIntoView();
}

function onKey(event) {
  if (
    event.altKey ||
    event.ctrlKey ||
    event.metaKey ||
    event.target.closest('input, select, canvas, .lens, pre')
  )
    return;
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  if (event.target.closest('#tokens')) {
    const token = clamp(state.token + by, 0, T - 1);
    change({ token }, `token ${token}`);
  } else change({ step: clamp(state.step + by, 0, steps.length - 1) });
}

byId('model').textContent = walk.model;
document.addEventListener('keydown', onKey);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => change({}));
drawMap();
change({});
