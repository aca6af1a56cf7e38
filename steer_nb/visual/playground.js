// The page of the playground: controls, and views of what the kernel or a recording answers.

const KL_SCALE = 4; // nats, at which a token has the full colour
const PATIENCE = 5000; // milliseconds, after which a missing answer is reported
const WAITING =
  "No answer yet. Is another cell running? If the kernel was restarted, run this cell again.";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// White space as a reader sees it: a leading space stays visible in a table.
const shown = (token) => token.replace(/^ /, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
const tint = (share, colour) =>
  `color-mix(in srgb, var(--${colour}) ${Math.round(100 * Math.min(1, share))}%, transparent)`;

// Sends requests to the kernel, and passes its messages to the request that they answer.
function kernelBackend(model) {
  const prefix = Math.random().toString(36).slice(2);
  const open = new Map();
  let count = 0;
  const receive = (message) => {
    const request = open.get(message.id);
    if (!request) return;
    if (!message.done) return request.item(message);
    open.delete(message.id);
    if (message.error) request.reject(new Error(message.error));
    else request.resolve(message);
  };
  model.on("msg:custom", receive);
  let writing = null;
  let follower = null;
  const ask = (kind, state, extra = {}, item = () => {}) =>
    new Promise((resolve, reject) => {
      const id = `${prefix}-${(count += 1)}`;
      open.set(id, { resolve, reject, item });
      model.send({ id, kind, state, ...extra });
    });
  return {
    ask,
    write: (state, max_new_tokens, item) => {
      const done = ask("generate", state, { max_new_tokens }, item);
      writing = `${prefix}-${count}`;
      return done;
    },
    stop: () => model.send({ id: writing, kind: "stop" }),
    follow: (move) => model.on("change:state", (follower = () => move(model.get("state")))),
    save: (state) => {
      model.set("state", state);
      model.save_changes();
    },
    close: () => {
      if (writing && open.has(writing)) model.send({ id: writing, kind: "stop" });
      model.off("msg:custom", receive);
      model.off("change:state", follower);
    },
  };
}

// Answers from states that were computed before: the nearest value of each slider.
function recordedBackend(recording) {
  const find = (state) => {
    const nearest = recording.settings.steerings.map((name) => {
      const value = state.strengths[name];
      const distance = (one) => Math.abs(one - value);
      return recording.values.reduce((best, one, row) => (distance(one) < distance(recording.values[best]) ? row : best), 0);
    });
    return recording.answers[nearest.join(" ")];
  };
  return {
    recorded: true,
    ask: async (kind, state) => ({ ...find(state)[kind], words: recording.words }),
    write: async (state, count, item) => {
      for (const one of find(state).generate) item(one);
    },
    stop: () => {},
    follow: () => {},
    save: () => {},
    close: () => {},
  };
}

function slider(name, settings, value, changed) {
  const { low, high, step } = settings;
  const digits = (String(step).split(".")[1] ?? "").length;
  const output = make("output");
  const show = () => (output.textContent = Number(input.value).toFixed(digits)); // as the browser rounded it
  const input = make("input", {
    type: "range", min: low, max: high, step, value, "aria-label": `strength of ${name}`,
    oninput: () => {
      show();
      changed();
    },
  });
  const set = (to) => {
    input.value = to;
    show();
  };
  const reset = make(
    "button",
    {
      type: "button", title: "set to 0", "aria-label": `set ${name} to 0`,
      onclick: () => {
        set(0);
        changed();
      },
    },
    "0",
  );
  show();
  const row = make("div", { class: "slider" }, make("span", { class: "name" }, name), input, output, reset);
  return { row, set, value: () => Number(input.value) };
}

function drawTokens(body, answer) {
  const most = Math.max(...answer.steered, ...answer.unsteered);
  body.replaceChildren(
    ...answer.tokens.map((token, row) => {
      const bars = ["steered", "unsteered"].map((side) =>
        make("div", { class: `bar ${side}`, style: `width:${(100 * answer[side][row]) / most}%` }),
      );
      const numbers = ["steered", "unsteered"].map((side) =>
        make("td", { class: `number ${side}` }, answer[side][row].toFixed(3)),
      );
      return make("tr", {}, make("th", { scope: "row" }, shown(token)), make("td", { class: "bars" }, ...bars), ...numbers);
    }),
  );
}

function drawMap(view, answer) {
  const isLens = answer.tokens !== undefined;
  const values = isLens ? answer.probabilities : answer.change;
  const most = isLens ? 1 : Math.max(1e-9, ...values.map((row) => Math.max(...row)));
  const says = (layer, column) => {
    const value = values[layer][column];
    const where = `layer ${layer}, after \u201c${shown(answer.words[column])}\u201d: `;
    if (isLens) return `${where}\u201c${shown(answer.tokens[layer][column])}\u201d, probability ${value.toFixed(3)}`;
    return `${where}the stream has changed by ${(100 * value).toFixed(1)} % of its norm`;
  };
  const heads = answer.words.map((word) => make("th", { scope: "col" }, shown(word)));
  const cells = [];
  const rows = values.map((row, layer) => {
    cells[layer] = row.map((value, column) => {
      const text = isLens ? shown(answer.tokens[layer][column]) : "";
      const cell = make("td", {
        id: `${view.id}-${layer}-${column}`, role: "gridcell", "aria-label": says(layer, column),
        style: `background:${tint(value / most, "steered")}`, onmouseenter: () => select(layer, column),
      }, text);
      return cell;
    });
    const label = layer % 5 === 0 || layer === values.length - 1 ? `${layer}` : "";
    return make("tr", { role: "row" }, make("th", { scope: "row" }, label), ...cells[layer]);
  });
  view.table.replaceChildren(make("thead", {}, make("tr", {}, make("td"), ...heads)), make("tbody", {}, ...rows.reverse()));
  view.table.classList.toggle("lens", isLens);
  const select = (layer, column) => {
    view.at = [layer, column];
    view.table.querySelector(".selected")?.classList.remove("selected");
    cells[layer][column].classList.add("selected");
    view.table.setAttribute("aria-activedescendant", cells[layer][column].id);
    view.caption.textContent = says(layer, column);
  };
  const last = answer.words.length - 1;
  const near = (layer, column) =>
    select(Math.min(values.length - 1, Math.max(0, layer)), Math.min(last, Math.max(0, column)));
  view.move = (up, right) => near(view.at[0] + up, view.at[1] + right);
  near(...(view.at ?? [values.length - 1, last]));
}

function build(el, settings, start, backend) {
  const root = make("div", { class: "steer-nb" });
  const status = make("p", { class: "status", role: "status", "aria-live": "polite" });
  const prompt = make("textarea", { rows: 2, "aria-label": "prompt", readonly: backend.recorded, oninput: () => changed() });
  prompt.value = start.prompt;
  const sliders = settings.steerings.map((name) => slider(name, settings, start.strengths[name] ?? 0, () => changed()));
  const layers = ["lowest", "highest"].map((which, end) =>
    make("input", {
      type: "number", min: 0, max: settings.layers - 1, value: start.layers[end],
      "aria-label": `${which} layer`, disabled: backend.recorded, oninput: () => changed(),
    }),
  );
  const current = () => ({
    prompt: prompt.value,
    strengths: Object.fromEntries(settings.steerings.map((name, row) => [name, sliders[row].value()])),
    layers: layers.map((input) => (input.value === "" ? null : Number(input.value))),
  });

  // next token
  const body = make("tbody");
  const tokens = make(
    "table", { class: "tokens" },
    make("caption", {}, "Next token"),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "token"), make("td", {}),
      make("th", { scope: "col", class: "steered" }, "steered"), make("th", { scope: "col", class: "unsteered" }, "unsteered"))),
    body,
  );

  // layers and tokens
  const group = `map-${Math.random().toString(36).slice(2)}`;
  const view = {
    id: group,
    table: make("table", { class: "map", role: "grid", tabindex: 0, "aria-label": "layers and tokens; arrow keys move" }),
    caption: make("p", { class: "says" }),
    at: null,
    move: () => {},
  };
  const arrows = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  view.table.addEventListener("keydown", (event) => {
    if (!(event.key in arrows)) return;
    event.preventDefault();
    event.stopPropagation();
    view.move(...arrows[event.key]);
  });
  let kind = "change";
  const choices = [["change", "change of the stream"], ["lens", "most likely token"]].map(([value, label]) =>
    make("label", {}, make("input", { type: "radio", name: group, value, checked: value === kind,
      onchange: () => { kind = value; refresh(); } }), ` ${label}`),
  );

  // text
  const texts = Object.fromEntries(
    ["steered", "unsteered"].map((side) => [side, make("p", { class: "text", role: "group", "aria-label": `${side} text` })]),
  );
  const count = make("input", { type: "number", min: 1, max: 500, value: 30, "aria-label": "number of new tokens", disabled: backend.recorded });
  const button = make("button", { type: "button", class: "generate", onclick: () => (writing ? backend.stop() : write()) }, "Generate");
  const mean = make("span", { class: "mean" });
  let writing = false;

  async function write() {
    writing = true;
    button.textContent = "Stop";
    for (const text of Object.values(texts)) {
      text.replaceChildren();
      text.classList.remove("stale");
    }
    const found = [];
    mean.textContent = "";
    try {
      await backend.write(current(), Number(count.value), (item) => {
        texts.unsteered.append(item.unsteered);
        if (item.kl === null) return;
        found.push(item.kl);
        texts.steered.append(make("span", { title: `${item.kl.toFixed(2)} nats`, style: `background:${tint(item.kl / KL_SCALE, "far")}` }, item.steered));
        mean.textContent = `mean divergence ${(found.reduce((a, b) => a + b) / found.length).toFixed(2)} nats per token`;
      });
    } catch (error) {
      status.textContent = error.message;
    }
    writing = false;
    button.textContent = "Generate";
  }

  // the code of this state
  const code = make("pre", { class: "code", hidden: true, tabindex: 0, "aria-label": "code" });
  const copy = make("button", { type: "button", class: "copy", onclick: async () => {
    try {
      code.textContent = (await backend.ask("code", current())).code;
      code.hidden = false;
      await navigator.clipboard.writeText(code.textContent);
      status.textContent = "Copied.";
    } catch (error) {
      status.textContent = code.hidden ? error.message : "Select the code and copy it: the browser did not allow it.";
    }
  } }, "Copy as code");

  // One request at a time: a change while the kernel computes replaces one that waits.
  let busy = false;
  let again = false;
  async function refresh() {
    again = true;
    if (busy) return;
    busy = true;
    root.dataset.busy = "true";
    while (again) {
      again = false;
      const late = setTimeout(() => (status.textContent = WAITING), PATIENCE);
      try {
        const state = current();
        drawTokens(body, await backend.ask("next", state));
        if (!again) {
          const asked = kind;
          const answer = await backend.ask(asked, state);
          if (asked === kind) drawMap(view, answer);
        }
        status.textContent = "";
      } catch (error) {
        status.textContent = error.message;
      }
      clearTimeout(late);
    }
    busy = false;
    root.dataset.busy = "false";
  }
  function changed() {
    for (const text of Object.values(texts)) text.classList.add("stale");
    code.hidden = true;
    backend.save(current());
    if (backend.recorded) write();
    refresh();
  }

  root.append(
    make("label", { class: "prompt" }, make("span", {}, "Prompt"), prompt),
    make("div", { class: "controls", role: "group", "aria-label": "strengths and layers" },
      ...sliders.map((one) => one.row),
      make("div", { class: "layers" }, make("span", { class: "name" }, "layers"), layers[0], "to", layers[1])),
    status,
    make("div", { class: "views" },
      make("div", { class: "view" }, tokens),
      make("div", { class: "view" }, make("div", { class: "choices", role: "radiogroup", "aria-label": "what the map shows" }, ...choices),
        make("div", { class: "scroll" }, view.table), view.caption)),
    make("div", { class: "writing" },
      backend.recorded ? "" : button, backend.recorded ? "" : make("label", {}, count, " tokens"), mean,
      make("span", { class: "legend" }, "0", make("span", { class: "scale" }), `${KL_SCALE} nats`)),
    make("div", { class: "views" },
      make("div", { class: "view" }, make("h4", { class: "steered" }, "steered"), texts.steered),
      make("div", { class: "view" }, make("h4", { class: "unsteered" }, "unsteered"), texts.unsteered)),
    backend.recorded ? "" : make("div", {}, copy, code),
  );
  // Python or another view of this widget has changed the state.
  backend.follow((state) => {
    if (JSON.stringify(state) === JSON.stringify(current())) return;
    prompt.value = state.prompt;
    settings.steerings.forEach((name, row) => sliders[row].set(state.strengths[name] ?? 0));
    layers.forEach((input, end) => (input.value = state.layers[end]));
    refresh();
  });
  // A notebook has shortcuts of its own: keys that are meant for a control stay here.
  root.addEventListener("keydown", (event) => event.stopPropagation());
  // Jupyter would take some, such as the arrows, before they arrive; it reads this on the control.
  for (const control of root.querySelectorAll("input, textarea, button, [tabindex]"))
    control.dataset.lmSuppressShortcuts = "true";
  el.append(root);
  if (backend.recorded) write();
  refresh();
  return () => backend.close();
}

export function renderRecorded(el, recording) {
  return build(el, recording.settings, recording.state, recordedBackend(recording));
}

export default {
  render: ({ model, el }) => build(el, model.get("settings"), model.get("state"), kernelBackend(model)),
};
