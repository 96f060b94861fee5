// The page: the map of all steps, the tokens, the chosen step, and the keys.

// Step or mistake -> its name on the map and its view.
const VIEWS = {
  prompt: ['Text and bytes', showPrompt],
  ids: ['Token ids', showIds],
  file: ['Weights file', showFile],
  config: ['Configuration', showConfig],
  embedding: ['Embedding', showEmbedding],
  norm: ['Norm', showNorm],
  qkv: ['q, k, v', showHeads],
  groups: ['Heads, groups', showGroups],
  rope: ['RoPE', showRope],
  positions: ['Positions', showPositions],
  attention: ['Attention', showAttention],
  residual: ['wo, residual', showResidual],
  swiglu: [null, showFeedForward],
  feed_forward: ['Feed-forward, residual', showFeedForward],
  layers: ['All layers', showLayers],
  logits: ['Norm, logits', showLogits],
  sampling: ['Sampling', showSampling],
  cache: ['KV cache', showCache],
  quantization: ['Quantization', showQuantization],
  time: ['Time', showTime],
};
const IN_LAYER = ['norm', 'qkv', 'groups', 'rope', 'positions', 'attention', 'residual', 'swiglu',
  'feed_forward'];
const ADDS = ['residual', 'swiglu', 'feed_forward']; // to the residual stream

// The index of a step is its number; mistakes come after the steps.
const steps = [
  ...walk.steps.map((step) => ({ ...step, draw: () => VIEWS[step.name][1](step) })),
  ...walk.mistakes.map((done, i) => ({
    ...done, number: walk.steps.length + i, question: 'What does this mistake change?', shapes: '',
    sources: [done.source], text: [done.explanation], checks: [done.check], numbers: [],
    picture: [], what_if: null, draw: () => showMistake(done),
  })),
];

const stepButton = (step) =>
  button(ADDS.includes(step.name) ? 'button.adds' : 'button', {
    'data-step': step.number, title: step.title, onclick: () => change({ step: step.number }),
  }, el('span.number', {}, String(step.number)), VIEWS[step.name]?.[0] ?? (
    step.name === 'swiglu' ? `${step.title.split(' ')[0]}, residual` : step.title));

// All steps in the order of their numbers: those of a forward pass along a line.
function drawMap() {
  const named = (names) => steps.filter((step) => names.includes(step.name)).map(stepButton);
  const stream = (...children) => el('div.stream', {}, ...children);
  const around = (title, children) =>
    children.length ? el('div.around', {}, caption(title), children) : '';
  byId('map').replaceChildren(
    stream(named(['prompt', 'ids'])),
    around('the model', named(['file', 'config'])),
    stream(
      named(['embedding']),
      el('div.layer', {}, caption(`a layer, ${config.n_layers} times`), named(IN_LAYER)),
      named(['layers', 'logits', 'sampling', 'cache'])),
    around('costs', named(['quantization', 'time'])),
    around('mistakes', steps.slice(walk.steps.length).map(stepButton)));
}

// The tokens, tinted by the attention weights of the chosen token while attention is shown.
function drawTokens() {
  const attention = steps[state.step].name === 'attention';
  const flat = attention ? walk.attention.weights[state.layer]?.[state.head] : null;
  const color = palette();
  const strip = byId('tokens');
  strip.replaceChildren(...walk.tokens.map((token, t) => {
    const chosen = t === state.token;
    const node = button('button.mono', {
      role: 'radio', 'aria-checked': String(chosen), tabindex: chosen ? 0 : -1,
      'data-focus': `token ${t}`, onclick: () => change({ token: t }, `token ${t}`),
    }, token.piece, el('small', {}, `${t} · ${token.id}`));
    const weight = flat && triangle(flat, walk.windows[state.layer]).at(state.token, t);
    if ((weight ?? null) !== null && t < state.token) tint(node, color(weight));
    return node;
  }));
  const chosen = strip.children[state.token];
  strip.scrollLeft = chosen.offsetLeft - (strip.clientWidth - chosen.offsetWidth) / 2;
}

const codeBlock = (text) => el('pre', { tabindex: 0 }, el('code', {}, text));

const sourceOf = ({ file, line, name, lines }) =>
  [el('p.source.mono', {}, `${file}, line ${line}: ${name}`), codeBlock(lines.join('\n'))];

function checkOf({ what, error, relative, allowed }) {
  const [by, share, bound] = [error, relative, allowed].map(exact);
  if (relative > allowed)
    return el('p.check.warns', {}, `! ${what}: differs from the running model by ${by} (relative ${share}, rounding explains ${bound})`);
  const measured = ` to the running model, largest difference ${by} (relative ${share}, allowed ${bound})`;
  return el('p.check', {}, `✓ ${what}: equal${allowed ? measured : ''}`);
}

const numbersOf = (numbers) =>
  picture(table(['', 'shape', 'the first numbers'], numbers.map(({ name, shape, first }) =>
    [name, shape.join(' × '), el('code', {}, first.map(exact).join('  '))])));

function drawStep() {
  observer.disconnect();
  const step = steps[state.step];
  const drawn = step.picture.join('\n').trim();
  const turn = (name, label, by, last) => button('button', {
    'data-focus': name, disabled: state.step === last ? '' : null,
    onclick: () => change({ step: state.step + by }, name),
  }, label);
  byId('step').replaceChildren(...[
    el('h2', { id: 'title' }, `${step.number}. ${step.title}`),
    el('p.question', {}, step.question),
    step.shapes ? el('p', {}, el('code.shapes', {}, step.shapes)) : [],
    step.text.map((text) => el('p', {}, text)),
    state.layer !== walk.layer && IN_LAYER.includes(step.name)
      ? note(`Text and checks are for layer ${walk.layer}; the pictures show layer ${state.layer}.`)
      : [],
    step.draw(),
    step.numbers.length ? [heading('Computed numbers'), numbersOf(step.numbers)] : [],
    heading('Source code'),
    step.sources.map(sourceOf),
    heading('Checks'),
    step.checks.map(checkOf),
    step.what_if
      ? [heading('Try'), el('p', {}, step.what_if.shows), codeBlock(step.what_if.command)] : [],
    drawn ? el('details', {}, el('summary', {}, 'As text'), el('pre', { tabindex: 0 }, drawn)) : [],
    el('div.steps', {}, turn('back', '← back', -1, 0), turn('next', 'next →', 1, steps.length - 1)),
  ].flat(Infinity).filter((part) => part !== null));
  const column = document.querySelector('.lens .chosen');
  const lens = column?.closest('.lens');
  if (lens) lens.scrollLeft = column.offsetLeft - lens.clientWidth / 2;
}

function markStep() {
  document.querySelector('[aria-current=step]')?.removeAttribute('aria-current');
  const current = document.querySelector(`[data-step="${state.step}"]`);
  current.setAttribute('aria-current', 'step');
  const map = byId('map');
  if (map.scrollWidth > map.clientWidth) // one line, on a narrow screen
    map.scrollLeft +=
      current.getBoundingClientRect().left - (map.clientWidth - current.offsetWidth) / 2;
  document.title = `${steps[state.step].title} · glassllama`;
}

// Change the state, draw it, and keep the focus. `draw`: a function that redraws less.
function change(changes, focus, draw = drawStep) {
  const turned = 'step' in changes && changes.step !== state.step;
  Object.assign(state, changes);
  drawTokens();
  draw();
  markStep();
  if (focus)
    document.querySelector(`[data-focus="${focus}"], [data-slider="${focus}"]`)
      ?.focus({ preventScroll: true });
  if (turned) byId('status').textContent = `Step ${state.step}: ${steps[state.step].title}`;
  if (turned && scrollY > byId('step').offsetTop) byId('step').scrollIntoView();
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target.closest('input, canvas, .lens, pre')) return;
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
