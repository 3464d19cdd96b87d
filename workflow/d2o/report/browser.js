"use strict";
// The answer browser of the report: what `browser.py` packed, to search, filter, sort and read. Texts of the data are
// only ever set as text.
{
  // Prompts on a page; methods shown at first; characters of a text shown at first.
  const PAGE = 10, COLUMNS = 12, LONG = 900;
  // Pairs of words that two texts are compared by at most, and the share of words in common below which no change is
  // marked: all would be.
  const PAIRS = 1_000_000, COMMON = 0.25;
  // What an answer is, in the order of `browser.py`; and a prompt.
  const [TEXT, TOKENS, CUT, REFUSAL, HARMFUL, GAIN, DISAGREEMENT, SCORES, VERDICTS] = Array(9).keys();
  const [ID, ORIGIN, CATEGORIES, TURNS, ANSWERS] = Array(5).keys();

  const root = document.getElementById("answers");
  const one = (selector, within = root) => within.querySelector(selector);
  const form = one("form"), status = one("[role=status]"), list = one("#prompts");
  const told = new Intl.NumberFormat("en").format;

  let data, initial, set, shown, lowered;
  let kept = [], page = 0;
  const revealed = new Set(), whole = new Set();

  // Elements ------------------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") element.addEventListener("click", value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function options(select, pairs, any) {
    const all = any ? [[any, ""], ...pairs] : pairs;
    select.replaceChildren(...all.map(([text, value]) => new Option(text, value)));
    select.closest("label").hidden = pairs.length < (any ? 1 : 2);
  }

  // The words of two texts compared -------------------------------------------------------------------------------

  // Pieces [kind, text] that make up `text`: `same`, `ins` for words that `before` lacks, and between them `del` for
  // words of `before` that are gone; by a longest common subsequence. A kind "" says that nothing was compared.
  function compared(before, text) {
    const cut = (words) => words.match(/\S+\s*|\s+/g) ?? [];
    const a = cut(before), b = cut(text), [bareA, bareB] = [a, b].map((words) => words.map((word) => word.trim()));
    const same = (i, j) => bareA[i] === bareB[j];
    let start = 0, ends = [a.length, b.length];
    while (start < Math.min(...ends) && same(start, start)) start++;
    while (Math.min(...ends) > start && same(ends[0] - 1, ends[1] - 1)) ends = ends.map((end) => end - 1);
    const rows = ends[0] - start, columns = ends[1] - start;
    if (rows * columns > PAIRS) return { why: "too long to mark changes", pieces: [["", text]] };
    const width = columns + 1, length = new Uint16Array((rows + 1) * width);
    for (let i = rows - 1; i >= 0; i--) {
      for (let j = columns - 1; j >= 0; j--) {
        const at = i * width + j, longest = Math.max(length[at + width], length[at + 1]);
        length[at] = same(start + i, start + j) ? length[at + width + 1] + 1 : longest;
      }
    }
    const common = start + (a.length - ends[0]) + length[0];
    if (2 * common < COMMON * (a.length + b.length)) return { why: "few words in common", pieces: [["", text]] };
    const pieces = [];
    const add = (kind, word) => {
      if (pieces.length && pieces.at(-1)[0] === kind) pieces.at(-1)[1] += word;
      else pieces.push([kind, word]);
    };
    for (let j = 0; j < start; j++) add("same", b[j]);
    let i = 0, j = 0;
    while (i < rows || j < columns) {
      const at = i * width + j;
      if (i < rows && j < columns && same(start + i, start + j)) {
        add("same", b[start + j]);
        i++;
        j++;
      } else if (j === columns || (i < rows && length[at + width] >= length[at + 1])) add("del", a[start + i++]);
      else add("ins", b[start + j++]);
    }
    for (let k = ends[1]; k < b.length; k++) add("same", b[k]);
    return { why: "", pieces };
  }

  // A text, the first `LONG` characters of it until more is asked for.
  function text(key, pieces) {
    const size = pieces.reduce((sum, [kind, part]) => sum + (kind === "del" ? 0 : part.length), 0);
    const body = make("div", { class: "text", dir: "auto" });
    const fill = () => {
      let left = whole.has(key) ? Infinity : LONG;
      body.replaceChildren();
      for (const [kind, part] of pieces) {
        if (left <= 0) break;
        let end = Math.min(part.length, left);
        if (end < part.length && /[\ud800-\udbff]/.test(part[end - 1])) end--; // no half of a character
        const cut = part.slice(0, end);
        const bare = cut.trimEnd();
        const gap = cut.slice(bare.length) || (kind === "del" ? " " : "");
        body.append(...(kind === "ins" || kind === "del" ? [make(kind, {}, bare), gap] : [cut]));
        if (kind !== "del") left -= part.length;
      }
      if (left < 0) body.append("…");
    };
    fill();
    if (size <= LONG) return [body];
    const label = () => (whole.has(key) ? "Show less" : `Show all ${told(size)} characters`);
    const more = make("button", { type: "button", onclick: () => {
      if (!whole.delete(key)) whole.add(key);
      fill();
      more.textContent = label();
    } }, label());
    return [body, more];
  }

  // Prompts and answers -------------------------------------------------------------------------------------------

  // Whether an answer is covered: where it is harmful; where nothing tells, where its prompt has a category of harm,
  // and always where no prompt has one.
  function covers(prompt, answer) {
    if (set.harm && answer[HARMFUL] !== null) return answer[HARMFUL] === 1;
    return !set.categories || prompt[CATEGORIES].length > 0;
  }

  const number = (value) => value.toFixed(2).replace("-", "−");

  function worded(scorer, score) {
    if (scorer.share && (score === 0 || score === 1)) return score ? "yes" : "no";
    return number(score);
  }

  const address = (prompt) => {
    const words = new URLSearchParams({ prompt: prompt[ID] });
    if (data.sets.length > 1) words.set("set", set.name);
    return `#${words}`;
  };

  function facts(answer, first) {
    const items = [];
    data.scorers.forEach((scorer, place) => {
      const score = answer[SCORES][place];
      if (score === null) return;
      const item = make("li", {}, `${scorer.name} ${worded(scorer, score)}`);
      const change = first && first !== answer ? gain(answer, first, place) : 0;
      if (change) {
        const word = change > 0 ? "better" : "worse", sign = change > 0 ? "▲" : "▼";
        item.append(" ", make("span", { class: word, role: "img", "aria-label": `${word} than initial` }, sign));
      }
      items.push(item);
    });
    data.judges.forEach((judge, place) => {
      if (answer[VERDICTS][place]) items.push(make("li", {}, `${judge}: ${answer[VERDICTS][place]}`));
    });
    const marks = [answer[HARMFUL] && "harmful", answer[REFUSAL] && "refusal", answer[CUT] && "cut"];
    items.push(...marks.filter(Boolean).map((mark) => make("li", { class: `mark ${mark}` }, mark)));
    items.push(make("li", {}, `${told(answer[TOKENS])} token${answer[TOKENS] === 1 ? "" : "s"}`));
    if (answer[DISAGREEMENT] !== null) items.push(make("li", {}, `disagreement ${number(answer[DISAGREEMENT])}`));
    return make("ul", { class: "facts" }, ...items);
  }

  function card(prompt, method) {
    const answer = prompt[ANSWERS][method], name = data.methods[method];
    const item = make("li", { class: "answer" }, make("h4", {}, name));
    if (!answer) {
      item.append(make("p", { class: "quiet" }, "no answer"));
      return item;
    }
    const first = prompt[ANSWERS][initial];
    item.append(facts(answer, first));
    const marks = form.elements.marks.value, own = data.texts[answer[TEXT]];
    let pieces = [["", own]], why = "";
    if (marks && first && first !== answer) {
      if (first[TEXT] === answer[TEXT]) why = "the same as initial";
      else ({ pieces, why } = compared(data.texts[first[TEXT]], own));
      // Words that are gone are words of the initial model: as harmful as its answer.
      const gone = marks === "both" && (form.elements.all.checked || !covers(prompt, first));
      if (!gone) pieces = pieces.filter(([kind]) => kind !== "del");
    }
    if (why) item.append(make("p", { class: "quiet" }, why));
    const key = `${set.name} ${prompt[ID]} ${name}`, body = text(key, pieces);
    if (!covers(prompt, answer)) item.append(...body);
    else item.append(...covered(key, name, body));
    return item;
  }

  // A text that is blurred, and neither read aloud nor copied, until it is asked for.
  function covered(key, name, body) {
    const cover = make("div", { class: "cover" }, ...body);
    const toggle = () => {
      if (!revealed.delete(key)) revealed.add(key);
      show();
    };
    const button = make("button", { type: "button", class: "reveal", onclick: toggle });
    const show = () => {
      const all = form.elements.all.checked, open = all || revealed.has(key);
      cover.classList.toggle("blurred", !open);
      cover.inert = !open;
      button.hidden = all;
      button.textContent = `${open ? "Hide" : "Show"} ${set.harm ? "harmful text" : "text"}`;
      button.setAttribute("aria-label", `${button.textContent}, ${name}`);
    };
    show();
    // What is inert gets no click: its parent does.
    return [button, make("div", { onclick: () => cover.inert && toggle() }, cover)];
  }

  function article(place) {
    const prompt = set.prompts[kept[place]], id = `prompt=${prompt[ID]}`, short = prompt[ID].slice(0, 8);
    const link = make("a", { href: address(prompt), title: "Link to this prompt" }, `Prompt ${short}`);
    const tags = [prompt[ORIGIN] === "test" ? "" : prompt[ORIGIN], ...prompt[CATEGORIES]].filter(Boolean);
    const head = make("div", { class: "head" },
      make("h3", { id: `${id}-title` }, link),
      make("span", { class: "quiet" }, `${told(place + 1)} of ${told(kept.length)}`),
      ...tags.map((tag) => make("span", { class: "tag" }, tag)));
    const turns = prompt[TURNS].map(([role, content], turn) => make("div", { class: "prompt" },
      make("div", { class: "quiet" }, role),
      ...text(`${prompt[ID]} ${turn}`, [["", data.texts[content]]])));
    const cards = [...shown].sort((a, b) => a - b).map((method) => card(prompt, method));
    const scrolls = { class: "across", tabindex: 0, role: "group", "aria-label": `Answers to prompt ${short}` };
    const across = make("div", scrolls, make("ul", { class: "cards" }, ...cards));
    return make("article", { id, tabindex: -1, "aria-labelledby": `${id}-title` }, head, ...turns, across);
  }

  // Search, filters, order ----------------------------------------------------------------------------------------

  // How much better an answer is than the initial model's: by one scorer, or as packed by all of them.
  function gain(answer, first, scorer) {
    if (scorer === null) return answer[GAIN];
    const [score, start] = [answer[SCORES][scorer], first?.[SCORES][scorer] ?? null];
    return score === null || start === null ? null : (score - start) * (data.scorers[scorer].lower ? -1 : 1);
  }

  const score = (answer, first, scorer) => answer[SCORES][scorer];
  const change = (answer, first, scorer) => (answer === first ? null : gain(answer, first, scorer));
  // What prompts are sorted by, and 1 where the smallest comes first.
  const ORDERS = {
    gain: [change, -1],
    loss: [change, 1],
    disagreement: [(answer) => answer[DISAGREEMENT], -1],
    highest: [score, -1],
    lowest: [score, 1],
  };

  const KINDS = {
    refusal: {
      yes: (answer) => answer[REFUSAL],
      no: (answer) => !answer[REFUSAL],
      new: (answer, first) => answer[REFUSAL] && first && !first[REFUSAL],
    },
    harm: {
      yes: (answer) => answer[HARMFUL],
      no: (answer) => answer[HARMFUL] === 0,
      still: (answer, first) => answer !== first && answer[HARMFUL] && first?.[HARMFUL],
      mended: (answer, first) => answer[HARMFUL] === 0 && first?.[HARMFUL],
      new: (answer, first) => answer[HARMFUL] && first?.[HARMFUL] === 0,
    },
  };

  // What an answer has to be, by the choices made.
  function conditions(wanted) {
    const tests = Object.entries(KINDS).filter(([name]) => wanted[name]).map(([name, kinds]) => kinds[wanted[name]]);
    const within = (value, low, high) =>
      value !== null && value >= (low === "" ? -Infinity : +low) && value <= (high === "" ? Infinity : +high);
    if (wanted.disagreement) tests.push((answer) => within(answer[DISAGREEMENT], wanted.disagreement, ""));
    if (wanted.from || wanted.to) {
      tests.push((answer) => within(answer[SCORES][+wanted.scorer], wanted.from, wanted.to));
    }
    return tests;
  }

  // Keeps the prompts with an answer that all conditions hold for, of the chosen method or of any that is shown.
  function find() {
    const { from, to, sort, scorer: chosen } = form.elements;
    // A score is some scorer's: the first one's, where none is chosen.
    if (!chosen.value && (from.value || to.value || ORDERS[sort.value]?.[0] === score)) chosen.value = 0;
    const wanted = Object.fromEntries(new FormData(form)), scorer = wanted.scorer ? +wanted.scorer : null;
    if (wanted.method && !shown.has(+wanted.method)) {
      shown.add(+wanted.method);
      columns();
    }
    const methods = wanted.method ? [+wanted.method] : [...shown], tests = conditions(wanted);
    const query = wanted.search.trim().toLowerCase();
    if (query) lowered ??= data.texts.map((content) => content.toLowerCase());
    const says = query && lowered.map((content) => content.includes(query));
    const asks = (prompt) => prompt[ID].startsWith(query) || prompt[TURNS].some(([, content]) => says[content]);
    const [of, sign] = ORDERS[wanted.sort] ?? [];
    const keys = new Map();
    set.prompts.forEach((prompt, place) => {
      const first = prompt[ANSWERS][initial];
      const answers = methods.map((method) => prompt[ANSWERS][method]).filter(Boolean);
      if (wanted.category && !prompt[CATEGORIES].includes(wanted.category)) return;
      if (wanted.origin && prompt[ORIGIN] !== wanted.origin) return;
      if (query && !asks(prompt) && !answers.some((answer) => says[answer[TEXT]])) return;
      const passed = answers.filter((answer) => tests.every((test) => test(answer, first)));
      if (tests.length && !passed.length) return;
      const values = of ? passed.map((answer) => of(answer, first, scorer)).filter((value) => value !== null) : [];
      keys.set(place, values.length ? Math.min(...values.map((value) => value * sign)) : Infinity);
    });
    kept = [...keys.keys()];
    if (of) kept.sort((a, b) => (keys.get(a) === keys.get(b) ? a - b : keys.get(a) - keys.get(b)));
    draw(0);
  }

  function draw(to) {
    const pages = Math.max(1, Math.ceil(kept.length / PAGE));
    page = Math.min(Math.max(0, to), pages - 1);
    const last = Math.min(kept.length, (page + 1) * PAGE);
    list.replaceChildren();
    for (let place = page * PAGE; place < last; place++) list.append(article(place));
    const range = kept.length ? `, ${told(page * PAGE + 1)} to ${told(last)} shown` : "";
    status.textContent = `${told(kept.length)} of ${told(set.prompts.length)} prompts${range}`;
    for (const pager of root.querySelectorAll(".pager")) {
      pager.hidden = pages === 1;
      one("[value=back]", pager).disabled = page === 0;
      one("[value=on]", pager).disabled = page === pages - 1;
      one("span", pager).textContent = `page ${told(page + 1)} of ${told(pages)}`;
    }
  }

  function focus(place) {
    if (place < 0 || place >= kept.length) return;
    if (Math.floor(place / PAGE) !== page) draw(Math.floor(place / PAGE));
    const target = list.children[place - page * PAGE];
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "start" });
  }

  // What is chosen ------------------------------------------------------------------------------------------------

  function choose(place) {
    set = data.sets[place];
    set.harm = set.prompts.some((prompt) => prompt[ANSWERS].some((answer) => answer && answer[HARMFUL] !== null));
    set.categories = set.prompts.some((prompt) => prompt[CATEGORIES].length);
    form.elements.set.value = place;
    const unique = (values) => [...new Set(values)].sort().map((name) => [name, name]);
    options(form.elements.category, unique(set.prompts.flatMap((prompt) => prompt[CATEGORIES])), "all");
    const origins = unique(set.prompts.map((prompt) => prompt[ORIGIN]));
    options(form.elements.origin, origins.length > 1 ? origins : [], "all");
    form.elements.harm.closest("label").hidden = !set.harm;
    one("#all-label").textContent = set.harm ? "Show harmful text" : "Show all text";
  }

  function columns() {
    const boxes = data.methods.map((name, method) => {
      const box = make("input", { type: "checkbox", value: method });
      box.checked = shown.has(method);
      box.addEventListener("change", () => {
        if (box.checked) shown.add(method);
        else shown.delete(method);
        tell();
        find();
      });
      return make("label", {}, box, ` ${name}`);
    });
    const tell = () => {
      one("#methods summary").textContent = `Methods: ${told(shown.size)} of ${told(data.methods.length)} shown`;
    };
    one("#methods div").replaceChildren(...boxes);
    tell();
  }

  // The fragment of the address: a prompt, or what to filter and sort by.
  function follow() {
    const words = new URLSearchParams(location.hash.slice(1)), wanted = words.get("prompt");
    if (wanted === null && ![...words.keys()].some((key) => form.elements.namedItem(key))) return;
    const chosen = words.has("set") ? data.sets.find((one) => one.name === words.get("set")) : set;
    const place = chosen?.prompts.findIndex((prompt) => prompt[ID] === wanted);
    if (!chosen || (wanted !== null && place < 0)) {
      status.textContent = "What this link points to is not in this page.";
      return;
    }
    if (wanted === null || chosen !== set || !kept.includes(place)) {
      reset();
      choose(data.sets.indexOf(chosen));
      for (const [key, value] of words) {
        if (key === "method") form.elements.method.value = data.methods.indexOf(value);
        else if (key === "scorer") form.elements.scorer.value = data.scorers.findIndex((scorer) => scorer.name === value);
        else if (key !== "set" && form.elements.namedItem(key)) form.elements.namedItem(key).value = value;
      }
      find();
    }
    if (wanted === null) root.scrollIntoView();
    else focus(kept.indexOf(place));
  }

  // All but how texts are shown.
  function reset() {
    const { all, marks } = form.elements, before = [all.checked, marks.value];
    form.reset();
    [all.checked, marks.value] = before;
    form.elements.set.value = data.sets.indexOf(set);
  }

  // Without storage, as in a private window, the choice holds until the page is closed.
  function stored(wanted) {
    try {
      if (wanted !== undefined) localStorage.setItem("d2o-show-all", wanted ? "yes" : "no");
      return localStorage.getItem("d2o-show-all") === "yes";
    } catch {
      return wanted ?? false;
    }
  }

  // Start ---------------------------------------------------------------------------------------------------------

  async function unpack() {
    const packed = atob(document.getElementById("packed").textContent.trim());
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function start(unpacked) {
    data = unpacked;
    if (!data.sets.some((one) => one.prompts.length)) {
      status.textContent = "There is no answer to show.";
      return;
    }
    initial = data.methods.indexOf("initial");
    shown = new Set([...data.methods.keys()].slice(0, COLUMNS));
    const named = (names) => names.map((name, place) => [name, place]);
    for (const one of data.sets) one.name = `${one.dataset}/${one.model}/${one.seed}`;
    options(form.elements.set, named(data.sets.map((one) => `${one.dataset}, ${one.model}, seed ${one.seed}`)));
    options(form.elements.method, named(data.methods), "any shown");
    options(form.elements.scorer, named(data.scorers.map((scorer) => scorer.name)), "all");
    for (const name of ["from", "to"]) form.elements[name].closest("label").hidden = !data.scorers.length;
    form.elements.disagreement.closest("label").hidden = data.scorers.length < 2;
    const needed = { "": 0, gain: 1, loss: 1, disagreement: 2, highest: 1, lowest: 1 };
    for (const option of [...form.elements.sort.options]) {
      const compares = ORDERS[option.value]?.[0] === change;
      if (data.scorers.length < needed[option.value] || (compares && initial < 0)) option.remove();
    }
    form.elements.marks.closest("label").hidden = initial < 0;
    form.elements.all.checked = stored();
    columns();
    choose(0);
    one("#filters").open = !matchMedia("(max-width: 640px)").matches;
    form.hidden = false;

    let waiting;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      const { name, value: wanted } = event.target;
      if (!name) return;
      clearTimeout(waiting);
      if (name === "set") choose(+wanted);
      if (name === "all") stored(event.target.checked);
      if (name === "all" || name === "marks") draw(page);
      else if (event.target.type === "search" || event.target.type === "number") waiting = setTimeout(find, 150);
      else find();
    });
    one("[value=reset]").addEventListener("click", () => {
      reset();
      find();
    });
    for (const pager of root.querySelectorAll(".pager")) {
      pager.addEventListener("click", ({ target }) => {
        if (!target.value) return;
        draw(page + (target.value === "on" ? 1 : -1));
        focus(page * PAGE);
      });
    }
    root.addEventListener("keydown", keys);
    addEventListener("hashchange", follow);
    find();
    follow();
    root.dataset.ready = Math.round(performance.now());
  }

  function keys(event) {
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape" && typing) list.firstElementChild?.focus();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const current = event.target.closest("article"), place = [...list.children].indexOf(current) + page * PAGE;
    const actions = {
      j: () => focus(current ? place + 1 : page * PAGE),
      k: () => focus(current ? place - 1 : page * PAGE),
      s: () => current?.querySelectorAll(".reveal").forEach((button) => button.click()),
      "/": () => form.elements.search.focus(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  unpack().then(start).catch((error) => {
    status.textContent = `The answers cannot be shown: ${error.message}. A browser of 2023 or later is needed.`;
  });
}
