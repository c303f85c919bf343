// The mask viewer of `flashprefill lab`: true block masses in blue where a method keeps them, red where it does not.
// Data: [{name, tokens, heads, block, mass: {layer: uint16 [heads][tiles][blocks]}, lines: [{label, tile, group, block,
// bits: {layer: bits [mask heads][tile rows][blocks], first bit highest}}]}], arrays deflated and in base64. A mask's
// tiles and blocks may be smaller or larger than the masses': then a block is kept in part.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const canvas = $("mask"), tip = $("tip");
  const cache = new Map();
  let view = null;

  const unpack = async (text) => {
    if (!cache.has(text)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      cache.set(text, new Response(stream).arrayBuffer());
    }
    return cache.get(text);
  };
  const fill = (select, names) => {
    const old = select.value;
    select.replaceChildren(...names.map(([value, label]) => new Option(label, value)));
    if (names.some(([value]) => String(value) === old)) select.value = old;
  };
  const text = () => data[$("text").value];
  const shape = () => {
    const t = text(), blocks = Math.ceil(t.tokens / t.block);
    return {t, blocks, tiles: Math.ceil(t.tokens / 128)};
  };

  // The mass of a block for a tile of 128 queries, and which part of it the method keeps for them.
  const massAt = (v, tile, block) => {
    const code = v.mass[(v.head * v.tiles + tile) * v.blocks + block];
    return code ? 2 ** (-24 * (1 - (code - 1) / 65534)) : 0;
  };
  const keptAt = (v, tile, block) => {
    const rows = Math.ceil(v.t.tokens / v.line.tile), top = Math.floor(tile * 128 / v.line.tile);
    const bottom = Math.floor(Math.min(tile * 128 + 127, v.t.tokens - 1) / v.line.tile);
    const blocks = Math.ceil(v.t.tokens / v.line.block), first = Math.floor(block * v.t.block / v.line.block);
    const end = Math.min(blocks, Math.max(first + 1, Math.floor((block + 1) * v.t.block / v.line.block)));
    let kept = 0;
    for (let row = top; row <= bottom; ++row) {
      for (let b = first; b < end; ++b) {
        const at = (Math.floor(v.head / v.line.group) * rows + row) * blocks + b;
        kept += (v.bits[at >> 3] >> (7 - (at & 7))) & 1;
      }
    }
    return kept / (end - first) / (bottom - top + 1);
  };

  const draw = async () => {
    const {t, blocks, tiles} = shape(), layer = $("layer").value, line = t.lines[$("line").value];
    const [mass, bits] = await Promise.all([unpack(t.mass[layer]), unpack(line.bits[layer])]);
    const v = {t, blocks, tiles, line, head: Number($("head").value), mass: new Uint16Array(mass), bits: new Uint8Array(bits)};
    view = v;
    const image = new ImageData(blocks, tiles);
    let kept = 0, seen = 0, recall = 0;
    for (let tile = 0; tile < tiles; ++tile) {
      for (let block = 0; block < blocks; ++block) {
        const at = 4 * (tile * blocks + block);
        if (block * t.block > Math.min(tile * 128 + 127, t.tokens - 1)) {
          image.data.set([255, 255, 255, 255], at);
          continue;
        }
        const m = massAt(v, tile, block), keep = keptAt(v, tile, block);
        ++seen;
        kept += keep;
        recall += keep * m;
        const depth = m > 0 ? Math.max(0, 1 + Math.log10(m) / 4) : 0; // 1e-4 and less is pale
        const pale = keep >= 0.5 ? [222, 232, 245] : [240, 240, 240];
        const dark = keep >= 0.5 ? [18, 72, 150] : [205, 20, 20];
        image.data.set([...pale.map((p, i) => p + (dark[i] - p) * depth), 255], at);
      }
    }
    const small = new OffscreenCanvas(blocks, tiles);
    small.getContext("2d").putImageData(image, 0, 0);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    $("sum").textContent = `keeps ${(100 * kept / seen).toFixed(1)}% of the blocks and ${(100 * recall / tiles).toFixed(1)}% of the attention`;
  };

  canvas.addEventListener("mousemove", (event) => {
    if (!view) return;
    const v = view, box = canvas.getBoundingClientRect();
    const tile = Math.min(v.tiles - 1, Math.floor((event.clientY - box.top) / box.height * v.tiles));
    const block = Math.min(v.blocks - 1, Math.floor((event.clientX - box.left) / box.width * v.blocks));
    const last = Math.min(tile * 128 + 127, v.t.tokens - 1);
    if (block * v.t.block > last) { tip.textContent = "the future"; return; }
    let kept = 0, seen = 0, recall = 0, rank = 1;
    const mass = massAt(v, tile, block), part = keptAt(v, tile, block);
    for (let b = 0; b * v.t.block <= last; ++b) {
      const m = massAt(v, tile, b), keep = keptAt(v, tile, b);
      ++seen; kept += keep; recall += keep * m; rank += m > mass;
    }
    tip.textContent = [
      `queries  ${tile * 128} - ${last}`,
      `keys     ${block * v.t.block} - ${Math.min((block + 1) * v.t.block, v.t.tokens) - 1}`,
      `mass     ${(100 * mass).toPrecision(3)}%, number ${rank} of ${seen}`,
      `         ${part === 0 ? "left out" : part < 1 ? "kept in part" : "kept"}`, "",
      "the tile's row", `kept     ${+kept.toFixed(1)} of ${seen} blocks`, `recall   ${(100 * recall).toFixed(2)}%`,
    ].join("\n");
  });
  const text_changed = () => {
    const t = text();
    fill($("layer"), Object.keys(t.mass).map((layer) => [layer, layer]));
    fill($("head"), Array.from({length: t.heads}, (_, h) => [h, h]));
    fill($("line"), t.lines.map((line, i) => [i, line.label]));
    draw();
  };
  fill($("text"), data.map((t, i) => [i, `${t.name} (${t.tokens.toLocaleString()} tokens)`]));
  $("text").addEventListener("change", text_changed);
  for (const id of ["layer", "head", "line"]) $(id).addEventListener("change", draw);
  text_changed();
})();
