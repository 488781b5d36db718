"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const data = JSON.parse($("data").textContent);
  const Q = data.queries.length;
  const titles = { ...Object.fromEntries(all("fieldset input").map((box) => [box.value, box.parentElement.textContent.trim()])), untold: "not told from zero", noise: "noise" };

  // what the page knows: entries [class, name, caption, file, twins]
  const pathOf = (file) => { try { return decodeURIComponent(file ?? ""); } catch { return file; } };
  const texts = (entries) => entries.map(([, name, caption, file]) => `${name} ${caption} ${pathOf(file)}`.toLowerCase());
  const trainTexts = texts(data.train), queryTexts = texts(data.queries);
  const kindOf = (q, i) => {
    const { numbers: [first], error, noise } = data.scores[q];
    if (noise || Math.abs(first[i]) <= data.notTold * (error ?? 0) || first[i] === 0) return noise ? "noise" : "untold";
    return first[i] * (data.sign || 1) > 0 ? "helps" : "hinders";
  };
  const rankOf = (q, i) => {
    const { length } = data.scores[q].images;
    return i < length / 2 || length === data.N ? i + 1 : data.N - length + i + 1;
  };
  const at = data.scores.map(({ images }) => new Map(images.map((place, i) => [place, i])));
  const numberText = (value) => (value < 0 ? "−" : "+") + String(+Math.abs(value).toPrecision(2));
  const numbersOf = (q, i) => data.scores[q].numbers.map((own, method) => numberText(own[i]) + data.units[method]);
  const counts = data.train.map(() => ({ helps: 0, hinders: 0, untold: 0, noise: 0 }));
  data.scores.forEach(({ images }, q) => images.forEach((place, i) => counts[place][kindOf(q, i)]++));

  // pictures are in the style sheet once
  const rules = new Map([...$("pictures").sheet.cssRules].map((rule) => [rule.selectorText.slice(1), rule.style]));
  const address = (name) => rules.get(name)?.backgroundImage.slice(5, -2);
  const pictureOf = ([name, title, caption, file], lazy = true) => {
    const own = address(name);
    return make("img", { className: `picture ${name}`, alt: caption ? `${title}: ${caption}` : title, loading: lazy ? "lazy" : "eager", src: own ?? file ?? "" });
  };
  for (const image of all("img.picture")) image.src = address(image.classList[1]) ?? image.src;
  const nameOf = (name) => {
    const dot = name.lastIndexOf("."), cut = dot > 0 && name.length - dot <= 12 ? dot : name.length;
    return make("span", { className: "name" }, ...name.slice(0, cut).split(/(?<=[/_-])/).flatMap((part) => [part, make("wbr")]).slice(0, -1), make("span", { className: "end" }, name.slice(cut)));
  };
  const captionOf = (caption) => (caption ? [make("i", {}, caption)] : []);
  const twinsOf = ([, , , , twins]) => (twins.length ? [make("em", { className: "twin" }, twins.length === 1 ? "has a double" : `has ${twins.length} doubles`)] : []);
  const figureOf = (place, notes) => {
    const entry = data.train[place];
    const figure = make("figure", {}, make("button", { type: "button", className: "open" }, pictureOf(entry)),
      make("figcaption", {}, ...notes.map((note) => make("b", {}, note)), nameOf(entry[1]), ...captionOf(entry[2]), ...twinsOf(entry)));
    figure.dataset.place = place;
    return figure;
  };
  for (const figure of all("figure[data-place]")) figure.lastElementChild.append(...twinsOf(data.train[figure.dataset.place]));

  // what is shown: the first images of each query, all images, or all of one query
  const view = $("view"), search = $("search"), order = $("order");
  view.append(make("option", { value: "firsts" }, "the first of each query"), make("option", { value: "all" }, data.listed < data.N ? "training images, all that are listed" : "all training images"),
    ...data.queries.map(([, name], q) => make("option", { value: q }, `all of ${name}`)));
  const byName = (one, other) => data.train[one][1].localeCompare(data.train[other][1], undefined, { numeric: true });
  const orders = {
    firsts: { "as given": (p, q) => p - q, "by name": (p, q) => data.queries[p][1].localeCompare(data.queries[q][1], undefined, { numeric: true }), "surest first": (p, q) => (data.scores[q].agreement ?? -2) - (data.scores[p].agreement ?? -2) },
    all: { [`${titles.helps}, most queries`]: (m, n) => counts[n].helps - counts[m].helps, [`${titles.hinders}, most queries`]: (m, n) => counts[n].hinders - counts[m].hinders, "by name": byName },
    one: { [`${titles.helps}, most`]: (m, n, at) => at.get(m) - at.get(n), [`${titles.hinders}, most`]: (m, n, at) => at.get(n) - at.get(m), strongest: (m, n, at, own) => Math.abs(own[at.get(n)]) - Math.abs(own[at.get(m)]), "by name": byName },
  };
  const group = () => (["firsts", "all"].includes(view.value) ? view.value : "one");
  let ordered = "", limit = 0, shown = [];
  const STEP = 200;
  const update = () => {
    if (ordered !== group()) {
      ordered = group();
      order.replaceChildren(...Object.keys(orders[ordered]).map((name) => make("option", { value: name }, name)));
    }
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (text) => words.every((word) => text.includes(word));
    const wanted = new Set(all("fieldset input:checked").map((box) => box.value));
    if (wanted.has("untold")) wanted.add("noise");
    $("firsts").hidden = ordered !== "firsts";
    $("list").hidden = ordered === "firsts";
    if (ordered === "firsts") updateFirsts(matches, wanted, words.length > 0);
    else updateList(matches, wanted);
  };
  const updateFirsts = (matches, wanted, searched) => {
    shown = [];
    let visible = 0;
    const compare = orders.firsts[order.value];
    const sections = all("#queries > .query").sort((one, other) => compare(+one.dataset.query, +other.dataset.query));
    if (sections.some((section, n) => section !== $("queries").children[n])) $("queries").append(...sections);
    for (const section of sections) {
      const q = +section.dataset.query, own = matches(queryTexts[q]);
      let some = own;
      for (const row of all("[data-kind]", section)) {
        row.hidden = !wanted.has(row.dataset.kind);
        for (const item of all("li", row)) {
          const place = +item.firstElementChild.dataset.place, is = own || matches(trainTexts[place]);
          item.hidden = !is;
          if (is && !row.hidden) { shown.push([q, place]); some = true; }
        }
      }
      section.hidden = !some;
      visible += some;
    }
    if ($("common")) $("common").hidden = searched || !wanted.has("helps");
    $("status").textContent = `${visible} of ${Q} queries, ${shown.length} images`;
  };
  const updateList = (matches, wanted) => {
    const one = ordered === "one", q = +view.value, compare = orders[ordered][order.value];
    const own = one ? data.scores[q] : null;
    const places = one ? [...own.images] : data.train.map((_, place) => place);
    const is = (place) => matches(trainTexts[place]) && (one ? wanted.has(kindOf(q, at[q].get(place))) : [...wanted].some((kind) => counts[place][kind]));
    shown = places.filter(is).sort((m, n) => compare(m, n, at[q], own?.numbers[0])).map((place) => [one ? q : null, place]);
    $("list-title").replaceChildren(...(one ? [pictureOf(data.queries[q]), make("span", {}, "All training images of ", nameOf(data.queries[q][1]))] : ["Training images"]));
    $("status").textContent = `${shown.length.toLocaleString("en")} of ${data.N.toLocaleString("en")} training images` + (places.length < data.N ? `; the page lists ${places.length.toLocaleString("en")}` : "");
    $("listed").replaceChildren();
    limit = 0;
    more();
  };
  const more = () => {
    const items = shown.slice(limit, (limit += STEP)).map(([q, place]) => {
      if (q === null) {
        const { helps, hinders } = counts[place];
        return make("li", {}, figureOf(place, [`${titles.helps} ${helps} of ${Q}`, `${titles.hinders} ${hinders}`]));
      }
      const i = at[q].get(place), kind = kindOf(q, i), told = ["helps", "hinders"].includes(kind);
      const notes = [...numbersOf(q, i), `rank ${rankOf(q, i).toLocaleString("en")}`, ...(told ? [] : [titles[kind]])];
      return make("li", { className: told ? (data.sign ? kind : "plain") : "untold" }, figureOf(place, notes));
    });
    $("listed").append(...items);
    $("more").hidden = limit >= shown.length;
    return items;
  };
  const show = (value) => { view.value = value; update(); };

  // a picture by itself: what the network saw beside the file, and what it does to each query
  const viewer = $("viewer");
  let opener = null;
  const neighbours = () => all("button.open").filter((button) => button.offsetParent !== null);
  const side = (image, text) => make("figure", {}, image, make("figcaption", {}, text));
  const open = (button) => {
    opener = button;
    const figure = button.closest("figure[data-place]");
    const place = figure ? +figure.dataset.place : null;
    const q = figure ? null : +button.closest("[data-query]").dataset.query;
    const entry = figure ? data.train[place] : data.queries[q], [name, title, caption, file] = entry;
    $("viewer-title").replaceChildren(nameOf(title));
    $("file").hidden = !file;
    $("file").href = file ?? "";
    $("save").hidden = !address(name);
    $("save").href = address(name) ?? "";
    $("save").download = title.split("/").pop().replace(/\.[^.]*$/, "") + "." + (/^data:image\/(\w+)/.exec(address(name))?.[1] ?? "png");
    const sides = [];
    if (address(name)) sides.push(side(pictureOf(entry, false), `as the network saw it${rules.get(name).imageRendering ? "" : " (thumbnail)"}`));
    if (file) {
      const whole = make("img", { src: file, alt: `${title}, the file` }), kept = address(`${name}-whole`);
      const own = side(whole, "the file, uncropped");
      whole.onerror = () => { if (kept && whole.src !== kept) whole.src = kept; else own.replaceChildren(make("figcaption", {}, "The file is not where it was when this page was written.")); };
      sides.push(own);
    }
    const body = [make("div", { className: "sides" }, ...sides), make("p", {}, caption)];
    if (figure) body.push(...doublesOf(entry), ...effectsOf(place));
    $("viewer-body").replaceChildren(...body);
    if (!viewer.open) viewer.showModal();
  };
  const doublesOf = ([, , , , twins]) => (twins.length ? [make("p", {}, `Nearly the same picture: ${twins.slice(0, 20).map((other) => data.train[other][1]).join(", ")}${twins.length > 20 ? ", …" : ""}. What doubles share is credited to none of them alone.`)] : []);
  const effectsOf = (place) => {
    const rows = at.map((own, q) => [q, own.get(place)]).filter(([, i]) => i !== undefined).sort(([p, i], [q, j]) => rankOf(p, i) - rankOf(q, j));
    const left = Q - rows.length;
    return [make("h3", {}, data.sign ? "which pictures did it help?" : "what is it to each picture?"),
      make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, make("thead", {}, make("tr", {}, ...["query", ...data.methods, "rank", ""].map((head) => make("th", {}, head)))),
        make("tbody", {}, ...rows.map(([q, i]) => make("tr", {}, make("td", {}, make("a", { href: `#${data.queries[q][0]}`, onclick: () => viewer.close() }, nameOf(data.queries[q][1]))), ...numbersOf(q, i).map((text) => make("td", {}, text)), make("td", {}, `${rankOf(q, i).toLocaleString("en")}`), make("td", {}, titles[kindOf(q, i)])))))),
      ...(left ? [make("p", { className: "none" }, `Of ${left} other queries it is neither among the first nor the last.`)] : [])];
  };
  const step = (by) => {
    const buttons = neighbours(), next = buttons[buttons.indexOf(opener) + by];
    if (next) open(next);
  };

  const csv = () => {
    const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
    const head = ["query", "image", ...data.methods.map((method, m) => method + (data.units[m] && ` (${data.units[m].trim()})`)), "rank", "effect", "caption", "file"];
    const reverse = ["image", titles.helps, titles.hinders, "not told", "noise", "caption", "file"];
    const lines = shown.map(([q, place]) => {
      const [, name, caption, file] = data.train[place], own = counts[place], i = q === null ? 0 : at[q].get(place);
      const beside = [caption, pathOf(file)];
      return q === null ? [name, own.helps, own.hinders, own.untold, own.noise, ...beside]
        : [data.queries[q][1], name, ...data.scores[q].numbers.map((numbers) => numbers[i]), rankOf(q, i), titles[kindOf(q, i)], ...beside];
    });
    return [ordered === "all" ? reverse : head, ...lines].map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  };
  const download = () => {
    const link = make("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: `${document.title.replace(/\W+/g, "-")}.csv` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button"), link = event.target.closest?.("a[href^='#']");
    if (button?.matches(".open")) open(button);
    if (button?.matches(".every")) {
      show(button.closest("[data-query]").dataset.query);
      $("list-title").focus();
      $("tools").scrollIntoView();
    }
    if (link && ordered !== "firsts") show("firsts");
    if (event.target === viewer) viewer.close();
  });
  $("previous").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  $("close").onclick = () => viewer.close();
  viewer.onkeydown = ({ key }) => { if (key === "ArrowLeft") step(-1); if (key === "ArrowRight") step(1); };
  viewer.onclose = () => opener?.focus();
  $("tools").onsubmit = (event) => event.preventDefault();
  for (const input of [view, order, ...all("fieldset input")]) input.onchange = update;
  let waiting = 0;
  search.oninput = () => { clearTimeout(waiting); waiting = setTimeout(update, 120); };
  $("more").onclick = () => more()[0].querySelector("button").focus();
  $("csv").onclick = download;
  for (const element of [$("tools"), ...all(".every")]) element.hidden = false;
  update();
})();
