/* The search of the site, in place of zensical's, which wants every word of a question on one section.

A result is a section, and a word that is missing only makes it rank lower: sections are ordered by BM25, the words
of the whole page and of the questions that lead to it (`asked`, which build.py adds) counting too. The site's
program sends {type: 0, data: index} once and {type: 2, data: query} for each query; 1, 3 and 4 are the answers. */
"use strict";

const STOP_WORDS = new Set(
  (
    "a about all already also am an and any anything are as at be been best better but by can could did do does doing done for " +
    "from get give go good had has have how i if in into is it its just like ll make may me mean means must my need " +
    "no not now of on one only or other our out over own per please s same shall should show so some something take tell than " +
    "that the their them then there these they thing this those to too use used using very want was way we were what " +
    "when where whether which while who whose why will with without work works would you your"
  ).split(" "),
);
const FIELDS = {
  asked: { weight: 2.5, usual: 25 },
  title: { weight: 2.5, usual: 4 },
  path: { weight: 0.7, usual: 4 },
  text: { weight: 1, usual: 120 },
}; // and their usual numbers of words in a section
const SATURATION = 1.2; // of a word that a section repeats
const LENGTH = 0.5; // 0: a long section is not the worse for its length, 1: it is
const PAGE = 0.6; // of a page's score that each of its sections gets
const REPEATED = 0.6; // factor of a further section of a page, so that other pages are seen
const PREFIX = 0.5; // of a word that only begins with the word of the query
const MISSPELT = 0.4; // of a word that differs by one letter
const NAME = 3; // of a name such as group_std beside its parts
const COMMON = 0.2; // of a stop word beside other words
const FACTORS = [
  [/reference\/tokenrl|CHANGELOG/, 0.4],
  [/reference\/(?!run_directory|glossary|papers)|pages\/index/, 0.8],
]; // of pages that list much and explain little
const SHOWN = 0.05; // of the best score, below which nothing is shown

/** The words of a text of HTML: their stems and where they stand; a name such as pass@k also counts as a whole. */
function wordsOf(text) {
  const words = [];
  for (const match of text.matchAll(/<[^>]*>|&#?\w+;|[\p{L}\p{N}]+(?:[_@.'’-][\p{L}\p{N}]+)*/gu)) {
    const name = match[0].replace(/['’]s?$|['’]s\b/u, "");
    if (/^[<&]/.test(name)) continue;
    const parts = [...name.matchAll(/[\p{L}\p{N}]+/gu)];
    for (const part of parts) {
      const start = match.index + part.index;
      words.push({ stem: stemOf(part[0]), start, end: start + part[0].length });
    }
    if (parts.length > 1) {
      const whole = parts.map(([part]) => part).join("").toLowerCase();
      words.push({ stem: whole, start: match.index, end: match.index + name.length, isName: true });
    }
  }
  return words;
}

function stemOf(word) {
  const lower = word.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  if (STOP_WORDS.has(lower)) return lower;
  const stem = lower.replace(/(?<=\p{L}{3})(?:ations?|ators?|ates?|ating|ated|ions?|ings?|ers?|ors?|ed|es|e|s)$/u, "");
  return stem.replace(/(\p{L})\1$/u, "$1");
}

/** How often each stem stands in each document, by BM25: weighted by field, less for each repetition. */
class Counts {
  /** The usual numbers of words are those of a section; a document may be several sections. */
  constructor(sections = 1) {
    this.sections = sections;
    this.size = 0;
    this.stems = new Map(); // stem -> [[document, number], ...]
  }

  add(fields) {
    const numbers = new Map();
    for (const [field, words] of fields) {
      const { weight, usual } = FIELDS[field];
      const norm = SATURATION * (1 - LENGTH + (LENGTH * words.length) / (usual * this.sections));
      const times = new Map();
      for (const { stem } of words) times.set(stem, (times.get(stem) ?? 0) + 1);
      for (const [stem, count] of times)
        numbers.set(stem, (numbers.get(stem) ?? 0) + (weight * count) / (count + norm));
    }
    for (const [stem, number] of numbers) {
      if (!this.stems.has(stem)) this.stems.set(stem, []);
      this.stems.get(stem).push([this.size, number]);
    }
    this.size++;
  }

  /** The score of each document for a query, whose words are given as the weights of the stems that match them. */
  scores(query) {
    const scores = new Float64Array(this.size);
    for (const matching of query) {
      const best = new Map();
      for (const [stem, weight] of matching) {
        const entries = this.stems.get(stem) ?? [];
        const rarity = Math.log(1 + (this.size - entries.length + 0.5) / (entries.length + 0.5));
        for (const [document, number] of entries)
          best.set(document, Math.max(best.get(document) ?? 0, weight * rarity * number));
      }
      for (const [document, score] of best) scores[document] += score;
    }
    return scores;
  }
}

/** Whether one letter more, less, another one or two exchanged ones make one word of the other. */
function isMisspelt(one, other) {
  if (one.length < 4 || Math.abs(one.length - other.length) > 1) return false;
  let start = 0;
  while (start < one.length && one[start] === other[start]) start++;
  let end = 0;
  const rest = Math.min(one.length, other.length) - start;
  while (end < rest && one.at(-1 - end) === other.at(-1 - end)) end++;
  const [a, b] = [one.slice(start, one.length - end), other.slice(start, other.length - end)];
  return (a.length <= 1 && b.length <= 1) || (a.length === 2 && a === b[1] + b[0]);
}

/** Whether a word such as agentic or resumable begins with a shorter one. */
function isBeginning(one, other) {
  return one.length >= 4 && one.length >= other.length - 4 && other.startsWith(one);
}

class Index {
  constructor(items) {
    this.items = items;
    this.sections = new Counts();
    this.pageOf = [];
    const numbers = new Map();
    const wordsOfPages = [];
    for (const item of items) {
      const fields = Object.keys(FIELDS).map((field) => [field, wordsOf([item[field] ?? []].flat().join(" "))]);
      this.sections.add(fields);
      const page = item.location.split("#")[0];
      if (!numbers.has(page)) numbers.set(page, numbers.size);
      this.pageOf.push(numbers.get(page));
      const whole = (wordsOfPages[numbers.get(page)] ??= { asked: [], title: [], path: [], text: [] });
      for (const [field, words] of fields) whole[field].push(...words);
    }
    this.pages = new Counts(items.length / wordsOfPages.length);
    wordsOfPages.forEach((whole) => this.pages.add(Object.entries(whole)));
  }

  /** The stems that match a word of a query, with their weights. */
  matching({ stem, isName }, isTyped) {
    const weights = new Map([[stem, isName ? NAME : 1]]);
    const isKnown = this.sections.stems.has(stem);
    if (isKnown && !isTyped) return weights;
    const others = [...this.sections.stems.keys()].filter((other) => other !== stem);
    if (stem.length > 1)
      others.filter((other) => other.startsWith(stem)).forEach((other) => weights.set(other, PREFIX));
    if (!isKnown && weights.size === 1)
      others.filter((other) => isMisspelt(stem, other) || isBeginning(other, stem)).forEach((other) => weights.set(other, MISSPELT));
    return weights;
  }

  /** The sections that answer a query, the best first, and the stems to mark in them. */
  find(text) {
    const words = wordsOf(text);
    const rare = words.filter(({ stem }) => !STOP_WORDS.has(stem));
    const isTyped = ({ end }) => end === text.length;
    const query = (rare.length ? rare : words).map((word) => this.matching(word, isTyped(word)));
    const common = rare.length ? words.filter((word) => !rare.includes(word)) : [];
    const all = [...query, ...common.map(({ stem }) => new Map([[stem, COMMON]]))];
    const [answering, sections, pages] = [
      this.sections.scores(query),
      this.sections.scores(all),
      this.pages.scores(all),
    ];
    const ranked = this.items
      .map(({ location, title }, id) => {
        const isTitle = title.toLowerCase() === text.toLowerCase();
        const factor = isTitle ? 2 : (FACTORS.find(([pattern]) => pattern.test(location))?.[1] ?? 1);
        const page = this.pageOf[id];
        return { id, page, score: factor * (sections[id] + PAGE * pages[page]) };
      })
      .filter(({ id }) => answering[id] > 0)
      .sort((a, b) => b.score - a.score);
    const seen = new Map();
    for (const entry of ranked) {
      const times = seen.get(entry.page) ?? 0;
      entry.score *= REPEATED ** times;
      seen.set(entry.page, times + 1);
    }
    ranked.sort((a, b) => b.score - a.score);
    const least = SHOWN * (ranked[0]?.score ?? 0);
    return {
      ids: ranked.filter(({ score }) => score >= least).map(({ id }) => id),
      stems: new Set(query.flatMap((matching) => [...matching.keys()])),
    };
  }

  /** One page of results as the site's program shows them. */
  results({ input, page }) {
    const { ids, stems } = this.find(typeof input === "string" ? input.trimEnd() : "");
    const { id = Date.now(), size = 10, from = 0 } = page ?? {};
    const items = ids.slice(from, from + size).map((item) => ({ id: item, matches: this.matches(item, stems) }));
    const pagination = { total: ids.length };
    if (from > 0) pagination.prev = { id, size, from: from - size };
    if (from + size < ids.length) pagination.next = { id, size, from: from + size };
    return { items, pagination, aggregations: [], query: {} };
  }

  /** Where a section's title, path and text have the words of the query. */
  matches(item, stems) {
    return ["title", "path", "text"].map((field) => {
      const ranges = [];
      for (const { stem, start, end } of wordsOf([this.items[item][field] ?? []].flat().join(""))) {
        if (stems.has(stem) && start >= (ranges.at(-1)?.end ?? 0)) ranges.push({ start, end, value: end - start });
      }
      return { field, value: { highlight: { ranges } } };
    });
  }
}

let index;
self.onmessage = ({ data: { type, data } }) => {
  try {
    if (type === 0) {
      index = new Index(data.items);
      self.postMessage({ type: 1 });
    } else if (type === 2) {
      self.postMessage({ type: 3, data: index.results(data) });
    }
  } catch {
    self.postMessage({ type: 4 });
  }
};
