"use strict";
// Everything that comes from the data is put into the page as text (textContent), never as markup.
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");

  // ---- building blocks

  const SVG = "http://www.w3.org/2000/svg";
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }
  const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  function short(value) {
    if (!isNumber(value)) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return whole.format(value);
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
  }
  const percent = (value, digits = 1) => (isNumber(value) ? `${(100 * value).toFixed(digits)}\u00a0%` : "–");
  function duration(seconds) {
    const s = Math.round(seconds);
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
    return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  }
  const plural = (count, one, many = `${one}s`) => `${whole.format(count)} ${count === 1 ? one : many}`;

  const KINDS = { u1: Uint8Array, u2: Uint16Array, i4: Int32Array, f4: Float32Array };
  function unpack(column) {
    const text = atob(column.data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new KINDS[column.kind](bytes.buffer);
  }
  function unpackNames(coded) {
    const shared = unpack(coded.shared);
    const names = shared.length ? coded.rests.split("\n") : [];
    for (let i = 1; i < names.length; i++) names[i] = names[i - 1].slice(0, shared[i]) + names[i];
    return names;
  }

  // ---- a table that scrolls in its own box and sorts by each of its columns

  // columns: {label, value(row) -> number or text, shown(row) -> text or node, kind: "number", "name" or "wrap"}
  function table(label, columns, rows, sorted = null) {
    const body = make("tbody");
    const order = { column: sorted?.column ?? null, down: sorted?.down ?? false };
    const heads = columns.map((column, number) =>
      make("th", { scope: "col", class: column.kind ?? "" },
        make("button", { type: "button", class: "sort", title: column.hint,
          onclick: () => {
            order.down = order.column === number ? !order.down : column.kind === "number";
            order.column = number;
            show();
          } }, column.label)));
    function show() {
      const column = columns[order.column];
      const ordered = column ? [...rows].sort((a, b) => compare(column.value(a), column.value(b), order.down)) : rows;
      heads.forEach((head, number) => {
        if (number === order.column) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      body.replaceChildren(...ordered.map((row) => make("tr", { class: row.own ? "own" : null },
        columns.map((each) => make("td", { class: each.kind ?? "" }, (each.shown ?? each.value)(row) ?? "")))));
    }
    show();
    return make("div", { class: "scroll tall", role: "region", tabindex: "0", "aria-label": label },
      make("table", {}, make("caption", { class: "hidden" }, label),
        make("thead", {}, make("tr", {}, heads)), body));
  }
  // what is not known goes last, either way
  function compare(a, b, down) {
    const [gone, too] = [a, b].map((value) => value === null || value === undefined || value !== value || value === "");
    if (gone || too) return gone - too;
    const order = isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return down ? -order : order;
  }

  // ---- curves

  const COLOURS = [1, 2, 3, 4, 5, 6].map((number) => `var(--s${number})`);
  const DASHES = ["none", "6 4", "2 3"];
  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((unit) => unit * power).find((unit) => unit >= rough * 0.999);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(n * step || 0);  // no -0
    return found;
  }

  // series: [{name, x: [], y: [], dash, bars, points}]; format and xFormat make texts of numbers
  function chart({ title, note, series, x: xLabel = "epoch", format = short, xFormat = whole.format, zero = false, top, height = 190 }) {
    series = series.map((one, number) => {
      const kept = one.x.map((x, i) => [x, one.y[i]]).filter(([x, y]) => isNumber(x) && isNumber(y));
      return { colour: COLOURS[number % 6], dash: DASHES[Math.floor(number / 6) % 3], ...one, kept };
    }).filter((one) => one.kept.length);
    if (!series.length) return null;
    const every = series.flatMap((one) => one.kept);
    let [left, right] = [Math.min(...every.map(([x]) => x)), Math.max(...every.map(([x]) => x))];
    let [low, high] = [Math.min(...every.map(([, y]) => y)), Math.max(...every.map(([, y]) => y))];
    const bars = series.some((one) => one.bars);
    const width1 = series[0].barWidth ?? 1;
    if (bars) [left, right] = [left - width1 / 2, right + width1 / 2];
    if (zero || bars) [low, high] = [Math.min(0, low), Math.max(0, high)];
    if (top !== undefined) high = Math.max(high, top);
    if (low === high) [low, high] = [low - (Math.abs(low) * 0.05 || 0.5), high + (Math.abs(high) * 0.05 || 0.5)];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    if (series.some((one) => one.points)) [left, right] = [left - (right - left) * 0.06, right + (right - left) * 0.06];
    if (!(zero || bars)) low -= (high - low) * 0.04;
    if (top === undefined) high += (high - low) * 0.04;
    const stops = [...new Set(every.map(([x]) => x))].sort((a, b) => a - b);

    const picture = draw("svg", { role: "img", tabindex: "0",
      "aria-label": `${title}: ${series.map((one) => `${one.name}, from ${format(one.kept[0][1])} to ${format(one.kept.at(-1)[1])}`).join("; ")}. Arrow keys read values.` });
    const readout = make("ul", { class: "readout", "aria-live": "off" });
    const guide = draw("line", { stroke: "var(--strong-line)", "stroke-width": 1, "stroke-dasharray": "2 3", visibility: "hidden" });
    let place = null;
    let toX = () => 0;
    let toY = () => 0;

    function read(stop) {
      place = stop;
      const at = stop ?? stops.at(-1);
      const entries = series.map((one) => {
        const near = one.kept.findLast(([x]) => x <= at) ?? one.kept[0];
        return make("li", {},
          !bars && make("span", { class: `key${one.dash === "none" ? "" : " dashed"}`, style: { color: one.colour } }),
          make("span", { class: "quiet" }, `${one.name} `), make("b", {}, format(near[1])));
      });
      if (!bars || stop !== null) readout.replaceChildren(make("li", { class: "quiet" }, `${xLabel} ${bars ? series[0].label?.(at) ?? xFormat(at) : xFormat(at)}`), ...entries);
      else readout.replaceChildren();
      guide.setAttribute("visibility", stop === null ? "hidden" : "visible");
      if (stop !== null) for (const end of ["x1", "x2"]) guide.setAttribute(end, toX(stop));
    }

    function paint(width) {
      const labels = ticks(low, high, 4);
      const digits = Math.max(0, -Math.floor(Math.log10(labels.length > 1 ? labels[1] - labels[0] : 1) + 1e-9));
      const tick = (value) => (format === short && Math.abs(value) < 1e6 ? value.toFixed(Math.min(digits, 6)) : format(value));
      const room = Math.max(...labels.map((value) => tick(value).length)) * 6.6 + 12;
      const [x0, x1, y0, y1] = [room, width - 14, height - 24, 8];
      toX = (x) => x0 + ((x - left) / (right - left)) * (x1 - x0);
      toY = (y) => y0 - ((y - low) / (high - low)) * (y0 - y1);
      picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      picture.setAttribute("height", height);
      const parts = labels.map((value) => [
        draw("line", { x1: x0, x2: x1, y1: toY(value), y2: toY(value), stroke: "var(--line)", "stroke-width": 1 }),
        draw("text", { x: x0 - 8, y: toY(value) + 4, "text-anchor": "end" }, tick(value))]);
      const across = ticks(left, right, Math.max(3, Math.floor((x1 - x0) / (xLabel === "epoch" ? 64 : 90))))
        .filter((value) => xLabel !== "epoch" && !bars ? true : Number.isInteger(value));
      parts.push(across.map((value) => draw("text", { x: toX(value), y: height - 6, "text-anchor": "middle" }, xFormat(value))));
      for (const one of series) {
        if (one.bars) {
          const wide = Math.max(1, ((x1 - x0) / (right - left)) * width1);
          const gap = wide > 5 ? Math.min(2, wide * 0.18) : wide > 2.5 ? 0.6 : 0;
          parts.push(one.kept.map(([x, y], i) => draw("rect", {
            x: toX(x) - wide / 2 + gap / 2, width: wide - gap, y: Math.min(toY(y), y0 - (y > 0 ? 1 : 0)), height: Math.max(toY(0) - toY(y), y > 0 ? 1 : 0),
            rx: Math.min(2, wide / 4), fill: one.colours?.[i] ?? one.colour })));
          continue;
        }
        const points = one.kept.map(([x, y]) => `${toX(x).toFixed(1)},${toY(y).toFixed(1)}`);
        if (!one.points) parts.push(draw("polyline", { points: points.join(" "), fill: "none", stroke: one.colour, "stroke-width": 2,
          "stroke-dasharray": one.dash, "stroke-linejoin": "round", "stroke-linecap": "round" }));
        if (one.points || one.kept.length < 30) parts.push(one.kept.map(([x, y]) => draw("circle", {
          cx: toX(x), cy: toY(y), r: one.points ? 5 : 2.6, fill: one.colour, stroke: "var(--card)", "stroke-width": one.points ? 1.5 : 0 })));
      }
      guide.setAttribute("y1", y1);
      guide.setAttribute("y2", y0);
      picture.replaceChildren(...parts.flat(3), guide);
      read(place);
    }

    const nearest = (x) => stops.reduce((best, stop) => (Math.abs(toX(stop) - x) < Math.abs(toX(best) - x) ? stop : best), stops[0]);
    fill(picture, {
      onpointermove: (event) => {
        const box = picture.getBoundingClientRect();
        read(nearest((event.clientX - box.left) * (picture.viewBox.baseVal.width / box.width)));
      },
      onpointerleave: () => read(null),
      onblur: () => { readout.setAttribute("aria-live", "off"); read(null); },
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        readout.setAttribute("aria-live", "polite");
        const now = place === null ? (step > 0 ? -1 : stops.length) : stops.indexOf(place);
        read(stops[Math.max(0, Math.min(stops.length - 1, now + step))]);
      },
    }, []);
    const watched = make("div", {}, picture);
    let painted = 0;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== painted) paint((painted = width));
    }).observe(watched);

    const numbers = make("details", { class: "numbers" }, make("summary", {}, "As a table"));
    numbers.addEventListener("toggle", () => {
      if (!numbers.open || numbers.children.length > 1) return;
      const rows = stops.map((x) => ({ x, y: series.map((one) => one.kept.find(([at]) => at === x)?.[1]) }));
      numbers.append(table(title, [
        { label: xLabel, kind: "number", value: (row) => row.x, shown: (row) => (bars ? series[0].label?.(row.x) : null) ?? xFormat(row.x) },
        ...series.map((one, i) => ({ label: one.name, kind: "number", value: (row) => row.y[i], shown: (row) => format(row.y[i]) }))], rows));
    });
    return make("figure", { class: "card chart" },
      make("figcaption", {}, make("h3", {}, title), note && make("p", {}, note)), readout, watched, numbers);
  }

  // ---- pictures: places in one JPEG

  function addSprite(name, sprite) {
    document.styleSheets[0].insertRule(`.${name} { background-image: url("data:image/jpeg;base64,${sprite.jpeg}"); }`);
    const rows = Math.ceil(sprite.count / sprite.columns);
    const ratio = sprite.tile / sprite.side;
    const at = (cell, cells) => (cells * ratio === 1 ? 0 : ((cell * ratio) / (cells * ratio - 1)) * 100);
    return (number, label) => make("span", {
      class: `picture ${name}${sprite.side <= 48 ? " pixelated" : ""}`, role: label ? "img" : null, "aria-label": label,
      style: {
        "background-size": `${sprite.columns * ratio * 100}% ${rows * ratio * 100}%`,
        "background-position": `${at(number % sprite.columns, sprite.columns)}% ${at(Math.floor(number / sprite.columns), rows)}%`,
      } });
  }

  // ---- one run

  const NAMES = {
    times_trained: ["times trained", "in how many epochs it was trained on"],
    loss: ["loss", "of the views that it was given last"],
    distance: ["distance", "between the features of its two views"],
    entropy: ["entropy", "of what was predicted of it"],
    score: ["score", "what it is ranked by where a policy ranks: the highest are kept"],
    scored_epoch: ["last seen", "the epoch in which it was trained on, or scored, for the last time"],
    index: ["number", "its place in the data set"],
  };

  function section(id, title, intro, ...children) {
    const kept = children.flat(2).filter(Boolean);
    return make("section", { id, "aria-labelledby": `${id}-title` },
      make("h2", { id: `${id}-title` }, title), intro && make("p", { class: "quiet" }, intro), kept);
  }

  const bestOf = (rows, evaluator) => {
    const own = rows.filter((row) => row.own && row.evaluator === evaluator && isNumber(row.value) && /%/.test(row.metric ?? ""));
    return own.length ? own.reduce((best, row) => (row.value > best.value ? row : best)) : null;
  };

  function overview(run, level = "h1") {
    const { about, budget, metrics, samples } = run;
    const accuracy = bestOf(run.evaluation, "linear") ?? bestOf(run.evaluation, "knn") ?? bestOf(run.evaluation, "finetune");
    const knn = (metrics.knn_train_split ?? []).filter(isNumber).at(-1);
    const tiles = [];
    const tile = (label, big, small, share) => tiles.push(make("div", { class: "card tile" }, make("dt", {}, label),
      make("dd", {}, make("div", { class: "big" }, big),
        isNumber(share) && make("div", { class: "meter", "aria-hidden": "true" }, make("i", { style: { width: `${Math.min(100, 100 * share)}%` } })),
        make("div", { class: "small quiet" }, small))));
    let lede = [];
    if (budget) {
      const share = budget.planned / budget.unpruned;
      const saved = isNumber(budget.unpruned_seconds) ? budget.unpruned_seconds - budget.seconds.training - budget.seconds.scoring : null;
      tile("Samples trained on", percent(budget.finished ? budget.seen / budget.unpruned : share),
        budget.finished ? `${whole.format(budget.seen)} of ${whole.format(budget.unpruned)} that ${plural(about.epochs, "epoch")} without pruning take`
          : `is the plan; ${whole.format(budget.seen)} of ${whole.format(budget.planned)} are done`, budget.finished ? budget.seen / budget.unpruned : budget.seen / budget.planned);
      if (budget.seconds) {
        const pruned = budget.planned < budget.unpruned && saved !== null;
        tile(pruned ? "Training time saved, estimated" : "Training time",
          pruned ? (saved > 0 ? duration(saved) : "none") : duration(budget.seconds.training),
          pruned
            ? `${duration(budget.seconds.training)} of training${budget.seconds.scoring >= 1 ? ` and ${duration(budget.seconds.scoring)} of scoring` : ""}, against about ${duration(budget.unpruned_seconds)}: every step at the pace of this run’s`
            : `${duration(budget.seconds.monitoring)} of monitoring beside it`,
          pruned ? (budget.seconds.training + budget.seconds.scoring) / budget.unpruned_seconds : null);
      }
      if (!budget.finished) lede = ["This run is ", make("strong", {}, `at epoch ${budget.epochs_done} of ${budget.epochs_planned}`), ". What follows is what is known so far."];
      else if (budget.planned < budget.unpruned) {
        lede = ["This run trained on ", make("strong", {}, percent(budget.seen / budget.unpruned, 0)), " of the samples that the same epochs take without pruning",
          saved > 0 ? [", and saved about ", make("strong", {}, duration(saved)), ` of training, an estimate from its own pace`] : saved !== null ? ", and its scoring took as long as what was left out" : "", "."];
      } else lede = ["This run trained on every sample in every epoch. There is nothing that pruning saved."];
    }
    if (accuracy) tile(`Accuracy, ${accuracy.evaluator === "linear" ? "linear probe" : accuracy.evaluator}`, `${accuracy.value.toFixed(1)}\u00a0%`, `on ${isNumber(accuracy.n_test) ? plural(accuracy.n_test, "test image") : "the test images"}`, accuracy.value / 100);
    else if (isNumber(knn)) tile("kNN accuracy", percent(knn), "on a fixed part of the training images", knn);
    if (samples && budget?.pruned_epochs.some(Boolean)) {
      const never = run.neverChosen;
      tile("Never chosen while pruning", percent(never.length / samples.shown), `${plural(never.length, "sample")}: trained on in the ${budget.full_epochs} full epochs alone`, never.length / samples.shown);
    }
    if (accuracy && lede.length) lede.push(" Its features reach ", make("strong", {}, `${accuracy.value.toFixed(1)}\u00a0%`),
      accuracy.evaluator === "linear" ? " with a linear probe on test images." : ` by ${accuracy.evaluator} on test images.`);
    const facts = [
      about.objective === "simclr" ? "SimCLR" : "supervised",
      about.fraction > 0 ? `policy ${about.policy} leaves out ${percent(about.fraction, 0)}` : "no pruning",
      about.arch, budget && `${plural(budget.samples, "image")} of ${about.source}`, plural(about.epochs, "epoch"), `batches of ${about.batch_size}`,
      about.ended && `ended ${about.ended}`].filter(Boolean);
    const title = make(level, { id: "overview-title" }, run.name);
    const kept = budget && budget.kept.length > 1 && chart({
      title: "Share of the samples that each epoch trains on",
      note: budget.pruned_epochs.some(Boolean) ? "Lighter epochs are full ones: at the start, so that every sample has a score, and at the end, so that nothing is forgotten." : null,
      format: (value) => percent(value, 0), top: 1, height: 140,
      series: [{ name: "kept", bars: true, x: budget.kept.map((_, i) => i + 1), y: budget.kept,
        colours: budget.kept.map((_, i) => (budget.pruned_epochs[i] ? "var(--accent)" : "color-mix(in srgb, var(--accent) 38%, var(--card))")) }],
    });
    return make("section", { id: "overview", "aria-labelledby": "overview-title" },
      title, make("p", { class: "facts" }, facts.map((fact) => make("span", {}, fact))),
      lede.length > 0 && make("p", { class: "lede" }, lede),
      run.notes.map((line) => make("p", { class: "notice" }, line)),
      tiles.length > 0 && make("dl", { class: "tiles" }, tiles), kept);
  }

  function curves(run) {
    const m = run.metrics;
    const line = (name, key) => ({ name, x: m.epoch ?? [], y: m[key] ?? [] });
    const drawn = [
      chart({ title: "Loss", note: "Mean over the samples of the epoch. Where an epoch keeps the hardest samples, its mean is higher than that of all.", series: [line("loss", "loss")] }),
      chart({ title: "kNN accuracy of the encoder", note: "On a fixed part of the training images: how good the features are, without a classifier.", series: [line("kNN", "knn_train_split")], format: percent }),
      chart({ title: "How far the score can be trusted", zero: true, top: 1,
        note: "1: two draws of views rank the samples alike. 0: the ranking is chance, and random pruning does as well.",
        series: [line("score", "score_reliability"), line("one draw", "draw_reliability"), line("foresight", "foresight"), line("epoch to epoch", "score_repeat")] }),
      chart({ title: "How unevenly samples are trained", note: "Gini coefficient of the times trained: 0 where all are trained alike.", series: [line("Gini", "times_gini")], zero: true }),
      chart({ title: "Left out for long", note: `Share of the samples that none of the last ${run.idle_epochs} epochs trained on.`, series: [line("not trained on", "idle_share")], format: percent, zero: true }),
      chart({ title: "Kept again", note: "Share of the kept samples that the epoch before kept as well, and what chance alone would give.", series: [line("kept again", "kept_overlap"), line("by chance", "kept_overlap_chance")], format: (v) => percent(v, 0) }),
      chart({ title: "Classes among the kept", note: "Share among the kept over share in the data, of the least and the most kept class. 1: as in the data.", series: [line("least", "class_ratio_min"), line("most", "class_ratio_max")] }),
      chart({ title: "Speed", note: "Images a second while training.", series: [line("images/s", "images_per_second")], zero: true, format: (v) => whole.format(v) }),
    ].filter(Boolean);
    if (!drawn.length) return section("curves", "Curves", "metrics.jsonl has no epoch yet.");
    return section("curves", "Curves", "Move over a curve, or select it and use the arrow keys, to read its values.", make("div", { class: "charts" }, drawn));
  }

  // ---- the samples

  function condition(text) {
    const wanted = text.trim().replace(/−/g, "-");
    if (!wanted) return () => true;
    const number = "([-+]?(?:\\d+\\.?\\d*|\\.\\d+)(?:e[-+]?\\d+)?)";
    let found = wanted.match(new RegExp(`^${number}\\s*(?:\\.\\.+|…|–|to)\\s*${number}$`, "i"));
    if (found) {
      const [low, high] = [Number(found[1]), Number(found[2])];
      return (value) => value >= low && value <= high;
    }
    found = wanted.match(new RegExp(`^(>=|<=|≥|≤|>|<|=)?\\s*${number}$`, "i"));
    if (!found) return null;
    const limit = Number(found[2]);
    const digits = /e/i.test(found[2]) ? 9 : (found[2].split(".")[1] ?? "").length;
    switch (found[1]) {
      case ">": return (value) => value > limit;
      case "<": return (value) => value < limit;
      case ">=": case "≥": return (value) => value >= limit;
      case "<=": case "≤": return (value) => value <= limit;
      default: return (value) => value === limit || (digits > 0 && Math.abs(value - limit) <= 0.5 * 10 ** -digits);
    }
  }

  function samplesOf(run) {
    const { samples, budget } = run;
    const names = unpackNames(samples.names);
    const numbers = Object.fromEntries(Object.entries(samples.columns).map(([name, column]) => [name, unpack(column)]));
    const classes = samples.class ? unpack(samples.class) : null;
    const order = ["times_trained", "loss", "distance", "entropy", "score", "scored_epoch"];
    const keys = [...order.filter((key) => numbers[key]), ...Object.keys(numbers).filter((key) => !order.includes(key))];
    const columns = [{ key: "name", label: "name", values: names, text: true, filter: "contains" }];
    if (classes) columns.push({ key: "class", label: "class", values: classes, filter: "class" });
    for (const key of keys) columns.push({ key, label: NAMES[key]?.[0] ?? key.replaceAll("_", " "), hint: NAMES[key]?.[1], values: numbers[key], filter: "number" });
    columns.push({ key: "index", label: NAMES.index[0], hint: NAMES.index[1], values: unpack(samples.index), filter: "number" });
    run.rows = { names, numbers, classes, columns };
    const full = budget?.full_epochs ?? 0;
    run.neverChosen = [];
    if (budget?.pruned_epochs.some(Boolean)) numbers.times_trained.forEach((times, row) => { if (times <= full) run.neverChosen.push(row); });
  }
  const className = (run, row) => {
    const label = run.rows.classes?.[row];
    return label === undefined || label < 0 ? "" : run.samples.class_names[label];
  };
  const value = (run, column, row) =>
    column.text ? column.values[row] : column.key === "class" ? className(run, row)
      : column.key === "scored_epoch" && column.values[row] === 0 ? "never" : short(column.values[row]);

  function browser(run, number) {
    const { samples, budget } = run;
    const { names, numbers, classes, columns } = run.rows;
    const picture = run.pictures && addSprite(`p${number}`, { ...run.pictures, count: run.pictures.rows.length });
    const view = run.views && addSprite(`v${number}`, { ...run.views, count: run.views.rows.length * run.views.each });
    const pictureOf = new Map((run.pictures?.rows ?? []).map((row, place) => [row, place]));
    const viewsOf = new Map((run.views?.rows ?? []).map((row, place) => [row, place]));

    const FIRST = window.innerWidth < 640 ? 24 : 55;
    const state = { sort: "times_trained", down: true, filters: {}, page: 0, preset: "most", shownPictures: FIRST };
    let matching = new Uint32Array(0);
    const column = (key) => columns.find((one) => one.key === key);

    const all = {};
    const presets = [
      ["most", "Most trained on", { sort: "times_trained", down: true }],
      ["least", "Least trained on", { sort: "times_trained", down: false }],
      numbers.scored_epoch && ["longest", samples.stale ? "Longest not trained on" : "Longest not scored", { sort: "scored_epoch", down: false }],
      run.neverChosen.length > 0 && ["never", "Never chosen", { sort: "times_trained", down: false, filters: { times_trained: `<= ${budget.full_epochs}` } }],
      numbers.loss && ["hardest", "Hardest", { sort: "loss", down: true }],
      numbers.loss && ["easiest", "Easiest", { sort: "loss", down: false }],
    ].filter(Boolean);
    const explained = {
      most: "Trained on in the most epochs: what pruning kept.",
      least: "Trained on in the fewest epochs: what pruning left out.",
      longest: samples.stale
        ? `Not trained on for the longest time. ${budget && !budget.pruned_epochs.at(-1) && budget.finished && budget.pruned_epochs.some(Boolean) ? "The last epochs of this run were on everything, so that hardly any is left out of these." : ""}`
        : "Not scored for the longest time; scoring passes see samples that are not trained on.",
      never: `Trained on in at most ${budget?.full_epochs} epochs, as many as had every sample: while the run pruned, none or hardly one of its epochs chose them.`,
      hardest: "The highest loss, at the last views.",
      easiest: "The lowest loss, at the last views.",
    };

    const chips = presets.map(([name, label, to]) => make("button", { type: "button", class: "chip", "data-preset": name,
      onclick: () => { set({ ...to, filters: { ...(state.filters.class ? { class: state.filters.class } : {}), ...to.filters }, preset: name }); } }, label));
    const explanation = make("p", { class: "small quiet" });
    const inputs = {};
    const classSelect = () => make("select", { "aria-label": "Only this class", onchange: (event) => set({ filters: { ...state.filters, class: event.target.value }, preset: state.preset }) },
      make("option", { value: "" }, "all classes"),
      samples.class_names.map((name, label) => [samples.class_sizes[label], name, label]).filter(([size]) => size > 0)
        .map(([size, name, label]) => make("option", { value: String(label) }, `${name} (${whole.format(size)})`)));
    let timer = 0;
    for (const one of columns) {
      inputs[one.key] = one.filter === "class" ? classSelect() : make("input", {
        type: "text", autocomplete: "off", spellcheck: "false", "aria-label": one.text ? `Only names that contain` : `Only where ${one.label} is`,
        placeholder: one.text ? "contains" : one.key === columns[classes ? 2 : 1].key ? "> 3, 2..5" : "any",
        title: one.text ? "a part of the name" : "5, > 3, <= 0.2, or 2..5",
        oninput: (event) => { clearTimeout(timer); const text = event.target.value; timer = setTimeout(() => set({ filters: { ...state.filters, [one.key]: text }, preset: null }), 120); } });
    }
    const heads = columns.map((one) => make("th", { scope: "col", class: one.text ? "name" : one.filter === "class" ? "" : "number" },
      make("button", { type: "button", class: "sort", title: one.hint, "data-column": one.key,
        onclick: () => set({ sort: one.key, down: state.sort === one.key ? !state.down : one.filter === "number", preset: null }) }, one.label)));
    const body = make("tbody");
    const counts = make("p", { class: "small", role: "status" });
    const gallery = make("ul", { class: "gallery" });
    const more = make("button", { type: "button", class: "more", onclick: () => { state.shownPictures += 96; showPictures(); } }, "More pictures");
    const PAGE = 50;
    const before = make("button", { type: "button", onclick: () => turn(-1) }, "← Back");
    const after = make("button", { type: "button", onclick: () => turn(1) }, "Next →");
    const where = make("span", { class: "small quiet number" });
    const clear = make("button", { type: "button", class: "again", onclick: () => set({ filters: {}, preset: null }) }, "Clear filters");
    const box = make("div", { class: "scroll tall", role: "region", tabindex: "0", "aria-label": "All samples" },
      make("table", { "data-table": "samples" }, make("caption", { class: "hidden" }, "All samples"),
        make("thead", {}, make("tr", { class: "titles" }, heads),
          make("tr", { class: "filters" }, columns.map((one) => make("th", {}, inputs[one.key])))), body));

    function set(change) {
      Object.assign(state, change, { page: 0, shownPictures: FIRST });
      apply();
    }
    function turn(step) {
      state.page += step;
      showRows();
      box.scrollTop = 0;
    }
    function apply() {
      const tests = [];
      for (const [key, text] of Object.entries(state.filters)) {
        const one = column(key);
        const input = inputs[key];
        if (!text) { input.removeAttribute("aria-invalid"); continue; }
        if (one.filter === "class") { const label = Number(text); tests.push((row) => classes[row] === label); continue; }
        if (one.text) { const part = text.toLowerCase(); tests.push((row) => names[row].toLowerCase().includes(part)); continue; }
        const fits = condition(text);
        if (fits) { input.removeAttribute("aria-invalid"); tests.push((row) => fits(one.values[row])); } else input.setAttribute("aria-invalid", "true");
      }
      const found = [];
      for (let row = 0; row < names.length; row++) if (tests.every((test) => test(row))) found.push(row);
      const { values, text, filter } = column(state.sort);
      const sign = state.down ? -1 : 1;
      const collator = new Intl.Collator("en", { numeric: true });
      const key = filter === "class" ? (row) => className(run, row) : null;
      // equals in an order by chance, the same one each time: in the order of the data they would be of one class
      const chance = (row) => Math.imul(row + 1, 2654435761) >>> 0;
      found.sort((a, b) => {
        if (text || key) return sign * collator.compare(key ? key(a) : values[a], key ? key(b) : values[b]) || a - b;
        const [gone, too] = [values[a] !== values[a], values[b] !== values[b]];
        return gone || too ? gone - too : sign * (values[a] - values[b]) || chance(a) - chance(b);
      });
      matching = Uint32Array.from(found);
      for (const one of columns) if (inputs[one.key] !== document.activeElement) inputs[one.key].value = state.filters[one.key] ?? "";
      for (const one of columns) if (!state.filters[one.key]) inputs[one.key].removeAttribute("aria-invalid");
      columns.forEach((one, i) => {
        if (one.key === state.sort) heads[i].setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else heads[i].removeAttribute("aria-sort");
      });
      chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.preset === state.preset)));
      const told = explained[state.preset] ?? `Sorted by ${column(state.sort).label}, ${state.down ? "the highest" : "the lowest"} first.`;
      const under = ["how often it was trained on", secondFigure()?.label, classes && "its class"].filter(Boolean);
      explanation.textContent = picture ? `${told} Below each picture: ${under.join(", ")}.` : told;
      clear.hidden = !Object.values(state.filters).some(Boolean);
      showPictures();
      showRows();
    }
    const secondFigure = () => column(["times_trained", "name", "class", "index"].includes(state.sort) ? "loss" : state.sort);
    function tile(row) {
      const second = secondFigure();
      return make("li", {}, make("button", { type: "button", title: names[row], "aria-label": `${names[row]}, trained ${plural(numbers.times_trained[row], "time")}`, onclick: () => open(row) },
        picture(pictureOf.get(row)),
        make("span", { class: "caption" }, make("b", {}, `${numbers.times_trained[row]}×`), second && make("span", {}, value(run, second, row))),
        classes && make("span", { class: "caption", title: className(run, row) }, className(run, row))));
    }
    function showPictures() {
      if (!picture) return;
      const rows = Array.from(matching).filter((row) => pictureOf.has(row));
      gallery.replaceChildren(...rows.slice(0, state.shownPictures).map(tile));
      more.hidden = rows.length <= state.shownPictures;
      const part = samples.shown < samples.count ? ` (of ${whole.format(samples.count)}, ${whole.format(samples.shown)} are in this file)` : "";
      counts.textContent = `${plural(matching.length, "sample")}${part}, ${whole.format(Math.min(rows.length, state.shownPictures))} of ${plural(rows.length, "picture")} among them`;
    }
    function showRows() {
      const pages = Math.max(1, Math.ceil(matching.length / PAGE));
      state.page = Math.max(0, Math.min(pages - 1, state.page));
      const rows = Array.from(matching.subarray(state.page * PAGE, (state.page + 1) * PAGE));
      body.replaceChildren(...rows.map((row) => make("tr", {}, columns.map((one) => make("td", { class: one.text ? "name" : one.filter === "class" ? "" : "number" },
        one.text ? make("button", { type: "button", class: "rowname", onclick: () => open(row) }, names[row]) : value(run, one, row))))));
      if (!rows.length) body.append(make("tr", {}, make("td", { colspan: String(columns.length), class: "quiet" }, "No sample is like that.")));
      before.disabled = state.page === 0;
      after.disabled = state.page >= pages - 1;
      where.textContent = rows.length ? `${whole.format(state.page * PAGE + 1)}–${whole.format(state.page * PAGE + rows.length)} of ${whole.format(matching.length)}` : "0";
      if (!picture) counts.textContent = plural(matching.length, "sample");
    }

    function open(row) {
      const dialog = document.getElementById("sample");
      const place = matching.indexOf(row);
      const step = (by) => { const next = matching[place + by]; if (next !== undefined) open(next); };
      const seen = viewsOf.get(row);
      const shares = (one) => {
        if (!one.values || one.text || ["index", "class", "scored_epoch"].includes(one.key) || one.values[row] !== one.values[row]) return "";
        let below = 0, known = 0;
        for (const other of one.values) { if (other === other) known++; if (other < one.values[row]) below++; }
        return `more than ${percent(below / Math.max(1, known), 0)} of the samples`;
      };
      dialog.replaceChildren(make("div", { class: "sheet" },
        make("header", {}, make("h3", { id: "sample-name" }, names[row]),
          make("div", { class: "pager" },
            make("button", { type: "button", "aria-label": "The one before", disabled: place <= 0, onclick: () => step(-1) }, "←"),
            make("button", { type: "button", "aria-label": "The next one", disabled: place < 0 || place >= matching.length - 1, onclick: () => step(1) }, "→"),
            make("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, "Close"))),
        make("div", { class: "two" },
          pictureOf.has(row) ? picture(pictureOf.get(row), names[row]) : make("div", { class: "nopicture" }, "its picture is not in this file"),
          make("div", {},
            make("dl", {}, columns.filter((one) => !one.text).flatMap((one) => [
              make("dt", { title: one.hint }, one.label),
              make("dd", {}, value(run, one, row), make("span", { class: "quiet small" }, shares(one) && ` — ${shares(one)}`))])),
            seen !== undefined && [
              make("h3", { style: { "margin-top": "1.2rem" } }, run.views.each === 1 ? `The view of epoch ${run.views.epochs[seen]}` : `The two views of epoch ${run.views.epochs[seen]}`),
              make("div", { class: "views" }, Array.from({ length: run.views.each }, (_, i) => view(seen * run.views.each + i, `view ${i + 1}`))),
              make("p", { class: "small quiet" }, "What the network was given when it trained on this image for the last time: drawn again from the run’s seed.")]))));
      if (!dialog.open) dialog.showModal();
    }

    const times = samples.times;
    const centre = (i) => times.low + i * times.width + (times.width - 1) / 2;
    const spread = chart({
      title: "How often samples were trained on", x: "trained", height: 250,
      note: `Each bar counts the samples that were trained on ${times.width === 1 ? "so many times" : `${times.width} times alike`}. Without pruning there would be one bar.`,
      series: [{ name: "samples", bars: true, barWidth: times.width, x: times.counts.map((_, i) => centre(i)), y: times.counts,
        label: (at) => (times.width === 1 ? plural(at, "time") : `${Math.round(at - (times.width - 1) / 2)}–${Math.round(at + (times.width - 1) / 2)} times`) }] });
    const parts = [make("div", { class: samples.class_names ? "split" : "" }, spread, samples.class_names && classTable(run, (label) => {
      set({ filters: { class: String(label) }, sort: "times_trained", down: true, preset: null });
      chips[0].scrollIntoView({ block: "center" });
    }))];
    parts.push(make("div", { class: "browser" }, make("div", { class: "chips", role: "group", "aria-label": "Which samples first" }, chips),
      make("div", { class: "bar" }, explanation, counts),
      picture && [gallery, make("div", {}, more)],
      make("div", { class: "bar" }, make("h3", {}, "Every sample"), make("div", { class: "pager" }, clear, before, where, after)), box));
    apply();
    return section("samples", "Which samples were trained on",
      "Sort by any column, filter by any column, and open a sample to see it, its figures and, for some, the views that were drawn for it.", parts);
  }

  function classTable(run, choose) {
    const { samples } = run;
    const total = samples.class_sizes.reduce((a, b) => a + b, 0);
    const mean = samples.class_sizes.reduce((sum, size, i) => sum + size * samples.class_times[i], 0) / Math.max(1, total);
    const rows = samples.class_names.map((name, label) => ({ name, label, size: samples.class_sizes[label], times: samples.class_times[label],
      ratio: mean ? samples.class_times[label] / mean : null, loss: samples.class_loss?.[label] })).filter((row) => row.size > 0);
    return make("div", { class: "card" }, make("h3", {}, "By class"),
      make("p", { class: "small quiet" }, "Over its share: how often a class was trained on, compared with the mean of all samples."),
      table("By class", [
        { label: "class", kind: "name", value: (row) => row.name, shown: (row) => make("button", { type: "button", class: "rowname", onclick: () => choose(row.label) }, row.name) },
        { label: "over its share", kind: "number", value: (row) => row.ratio, shown: (row) => (isNumber(row.ratio) ? `${row.ratio.toFixed(2)}×` : "–") },
        { label: "times trained", kind: "number", value: (row) => row.times, shown: (row) => row.times.toFixed(1) },
        { label: "images", kind: "number", value: (row) => row.size, shown: (row) => whole.format(row.size) },
        ...(samples.class_loss ? [{ label: "loss", kind: "number", value: (row) => row.loss, shown: (row) => short(row.loss) }] : [])],
      rows, { column: 1, down: true }));
  }

  function warnings(run) {
    const when = (epochs) => {
      const known = epochs.filter((epoch) => epoch > 0);
      if (!known.length) return "before the first epoch";
      return known.length === 1 ? `epoch ${known[0]}` : `epochs ${known.slice(0, 8).join(", ")}${known.length > 8 ? " …" : ""}`;
    };
    const real = run.warnings.filter((one) => one.kind === "warning").length;
    return section("warnings", "Warnings", real ? "What the run noticed about itself, and what it means. None of it stopped the run."
      : run.warnings.length ? "The run gave no warning, and these notes." : "The run gave no warning.",
    run.warnings.length > 0 && make("div", { class: "warnings" }, run.warnings.map((one) => make("article", { class: `card warning ${one.kind}` },
      make("h3", {}, one.title ?? (one.kind === "note" ? "A note" : "A warning"), make("span", {}, when(one.epochs))),
      one.meaning && make("p", {}, one.meaning),
      make("p", { class: "said" }, one.line)))));
  }

  function evaluation(run) {
    if (!run.evaluation.length) return section("evaluation", "Evaluation", "Nothing was evaluated yet. The evaluate command adds its table here.");
    const shown = (row) => (row.own ? "this run" : row.encoder ?? "");
    const groups = new Map();
    for (const row of run.evaluation) {
      if (!isNumber(row.value) || !/%/.test(row.metric ?? "")) continue;
      const key = [row.evaluator, row.metric, row.data].join("\n");
      groups.set(key, [...(groups.get(key) ?? []), row]);
    }
    const cards = [...groups.values()].slice(0, 24).map((rows) => {
      const ordered = [...rows].sort((a, b) => b.value - a.value).slice(0, 12);
      return make("div", { class: "card" }, make("h3", {}, `${rows[0].evaluator}, ${rows[0].metric}`), make("p", { class: "small quiet" }, rows[0].data ?? ""),
        make("ul", { class: "ranks" }, ordered.map((row) => make("li", { class: row.own ? "own" : null },
          make("span", { title: row.protocol }, shown(row)),
          make("span", { class: "meter", "aria-hidden": "true" }, make("i", { style: { width: `${Math.max(0, Math.min(100, row.value))}%` } })),
          make("span", { class: "number" }, `${row.value.toFixed(2)}${isNumber(row.std) ? ` ± ${row.std.toFixed(2)}` : ""}`)))));
    });
    const columns = [
      { label: "encoder", kind: "name", value: shown }, { label: "evaluator", value: (row) => row.evaluator },
      { label: "metric", value: (row) => row.metric },
      { label: "value", kind: "number", value: (row) => row.value, shown: (row) => (isNumber(row.value) ? `${row.value.toFixed(/%/.test(row.metric ?? "") ? 2 : 4)}${isNumber(row.std) ? ` ± ${row.std.toFixed(2)}` : ""}` : "–") },
      { label: "test images", kind: "number", value: (row) => row.n_test, shown: (row) => (isNumber(row.n_test) ? whole.format(row.n_test) : "") },
      { label: "seed", kind: "number", value: (row) => row.seed },
      { label: "protocol", kind: "wrap", value: (row) => row.protocol }, { label: "data", kind: "wrap", value: (row) => row.data }];
    return section("evaluation", "Evaluation", "Frozen features judged by a classifier that is told in each row.",
      cards.length > 0 && make("div", { class: "split" }, cards), table("Evaluation", columns, run.evaluation));
  }

  function settings(run) {
    const pairs = (label, values, defaults) => table(label, [
      { label: "key", kind: "name", value: (row) => row[0], shown: (row) => make("code", {}, row[0]) },
      { label: "value", kind: "wrap", value: (row) => row[1], shown: (row) => (defaults && defaults[row[0]] !== row[1] ? make("b", {}, row[1]) : row[1]) }],
    Object.entries(values));
    return section("settings", "Settings", "Bold values differ from the defaults.",
      make("div", { class: "split" },
        make("div", {}, pairs("config.yaml", run.config, run.defaults)),
        Object.keys(run.environment).length > 0 && make("div", {}, pairs("environment.json", run.environment))));
  }

  // ---- several runs

  function comparison(runs) {
    const judged = new Map();
    for (const run of runs) for (const row of run.evaluation) if (row.own && isNumber(row.value)) {
      const key = `${row.evaluator} ${row.metric}`;
      if (!judged.has(key)) judged.set(key, new Map());
      judged.get(key).set(run, Math.max(row.value, judged.get(key).get(run) ?? -Infinity));
    }
    const minutes = (run) => (run.metrics.training_seconds ?? []).map((seconds, i) => (isNumber(seconds) ? (seconds + (run.metrics.scoring_seconds?.[i] ?? 0)) / 60 : null));
    const knn = (run) => (run.metrics.knn_train_split ?? []).map((share) => (isNumber(share) ? 100 * share : null));
    const last = (values) => (values ?? []).filter(isNumber).at(-1);
    const columns = [
      { label: "run", kind: "name", value: (run) => run.label }, { label: "policy", value: (run) => run.about.policy },
      { label: "samples", kind: "number", value: (run) => run.budget?.seen, shown: (run) => short(run.budget?.seen) },
      { label: "of unpruned", kind: "number", value: (run) => run.budget && run.budget.seen / run.budget.unpruned, shown: (run) => percent(run.budget && run.budget.seen / run.budget.unpruned) },
      { label: "minutes", kind: "number", value: (run) => last(minutes(run)), shown: (run) => { const m = last(minutes(run)); return isNumber(m) ? m.toFixed(2) : "–"; }, hint: "of training and scoring" },
      { label: "kNN, train split", kind: "number", value: (run) => last(run.metrics.knn_train_split), shown: (run) => percent(last(run.metrics.knn_train_split)) },
      ...[...judged].slice(0, 12).map(([key, values]) => ({ label: key, kind: "number", value: (run) => values.get(run), shown: (run) => (values.has(run) ? values.get(run).toFixed(2) : "–") }))];
    const over = (title, note, x, axis, xFormat) => chart({ title, note, x: axis, xFormat, format: (v) => v.toFixed(1), height: 240,
      series: runs.map((run) => ({ name: run.label, x: x(run) ?? [], y: knn(run) })) });
    const points = [...judged].filter(([key]) => /%/.test(key)).slice(0, 4).flatMap(([key, values]) => [
      ["samples seen", (run) => run.budget?.seen, whole.format], ["minutes", (run) => last(minutes(run)), (v) => v.toFixed(1)]]
      .map(([axis, x, xFormat]) => chart({ title: `${key} over ${axis}`, x: axis, xFormat, format: (v) => v.toFixed(1), height: 220,
        series: runs.filter((run) => values.has(run)).map((run) => ({ name: run.label, points: true, colour: COLOURS[runs.indexOf(run) % 6], x: [x(run)], y: [values.get(run)] })) })));
    return [make("section", { id: "compare", "aria-labelledby": "compare-title" },
      make("h1", { id: "compare-title" }, plural(runs.length, "run"), " side by side"),
      make("p", { class: "facts" }, runs.map((run) => make("span", {}, run.label))),
      make("div", { style: { "margin-top": "1.4rem" } }, table("Runs", columns, runs)),
      make("div", { class: "charts" },
        over("kNN accuracy over samples", "Per cent, on a fixed part of the training images.", (run) => run.metrics.samples_seen, "samples", whole.format),
        over("kNN accuracy over minutes", "Minutes of training and scoring on the machine of each run.", minutes, "minutes", (v) => v.toFixed(1)),
        points)),
    section("differences", "What differs in their configs", report.differences.length ? null : "Nothing but the directory.",
      report.differences.length > 0 && table("What differs", [
        { label: "key", kind: "name", value: (row) => row[0], shown: (row) => make("code", {}, row[0]) },
        ...runs.map((run, i) => ({ label: run.label, kind: "wrap", value: (row) => row[i + 1] }))], report.differences))];
  }

  // ---- the page

  const SECTIONS = { compare: "Compare", differences: "Differences", overview: "Overview", curves: "Curves", samples: "Samples", warnings: "Warnings", evaluation: "Evaluation", settings: "Settings" };
  const nav = document.getElementById("sections");
  const runs = report.runs;
  const same = new Set(runs.map((run) => run.name)).size < runs.length;
  runs.forEach((run) => {
    run.label = same ? run.folder : run.name;
    run.neverChosen = [];
    if (run.samples) samplesOf(run);
  });
  const holder = make("div");
  const tabs = runs.map((run, number) => make("button", { type: "button", class: "chip", onclick: () => { show(number); } }, run.label));
  const built = new Map();
  function show(number) {
    if (!built.has(number)) {
      const run = runs[number];
      built.set(number, [overview(run, runs.length > 1 ? "h2" : "h1"), curves(run),
        run.samples ? browser(run, number) : null, warnings(run), evaluation(run), settings(run)].filter(Boolean));
    }
    holder.replaceChildren(...built.get(number));
    tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === number)));
    nav.replaceChildren(...[...main.querySelectorAll("section")].map((part) => make("a", { href: `#${part.id}` }, SECTIONS[part.id])));
    watch();
  }
  let watcher = null;
  function watch() {
    watcher?.disconnect();
    watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) for (const link of nav.children) {
        if (link.getAttribute("href") === `#${entry.target.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-20% 0px -70% 0px" });
    main.querySelectorAll("section").forEach((part) => watcher.observe(part));
  }
  if (runs.length > 1) main.append(...comparison(runs), make("div", { class: "tabs", role: "group", "aria-label": "Which run is shown below" }, tabs));
  main.append(holder, make("footer", {}, `Written by ssl_emp ${report.version}. This file needs nothing else: it may be kept, copied and sent.`));
  show(0);

  // a click outside of the sheet closes it
  document.getElementById("sample").addEventListener("click", (event) => { if (event.target.id === "sample") event.target.close(); });

  const themes = [["", "◐", "as the system has them"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
  const theme = document.getElementById("theme");
  let chosen = 0;
  theme.addEventListener("click", () => {
    chosen = (chosen + 1) % themes.length;
    const [name, sign, label] = themes[chosen];
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    theme.textContent = sign;
    theme.setAttribute("aria-label", `Colours: ${label}`);
  });
})();
