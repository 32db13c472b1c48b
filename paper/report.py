"""report.html of paper/metrics.py: a contact sheet of each video with its scores, sorted by a score one chooses.

One file with its pictures inside and no link to anywhere, so it can be mailed. report.html#CLIP-T opens sorted by
CLIP-T; a "-" in front (#-CLIP-T) puts the highest first.
"""
import base64
import html
import io
import json

from PIL import Image

from common.run import write
from sample import contact_sheet

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:16px}} figure{{margin:0 0 20px}} img{{display:block;max-width:100%}}
figcaption span{{margin-right:12px;white-space:nowrap}} td,th{{padding:2px 10px;text-align:left}}</style>
<h1>{title}</h1>
<table><tr><th>metric<th>mean<th>n</tr>{table}</table>
<p>Sorted by <select id="score">{options}</select> <label><input type="checkbox" id="highest"> highest first</label>
(else lowest first; the first picture is the reference)</p>
<main>{figures}</main>
<h2>{problems} problems</h2><ul>{unusable}</ul>
<script>
const score = document.getElementById("score"), highest = document.getElementById("highest");
const main = document.querySelector("main"), figures = [...main.children];
function sort() {{
  const value = f => JSON.parse(f.dataset.scores)[score.value];
  const side = highest.checked ? -1 : 1;
  const missing = f => value(f) === undefined || value(f) === null;
  figures.sort((a, b) => missing(a) - missing(b) || side * (value(a) - value(b)));
  main.append(...figures);
}}
const asked = decodeURIComponent(location.hash.slice(1)) || {sort};
highest.checked = asked.startsWith("-");
score.value = asked.replace(/^-/, "");
if (score.selectedIndex < 0) score.selectedIndex = 0;
score.onchange = highest.onchange = sort;
sort();
</script>
"""


def contact_sheet_uri(reference, frames, height=112):
    """The reference and six of the frames in a row, as a data: address of a JPEG."""
    frames = [Image.fromarray(frames[round(i * (len(frames) - 1) / 5)]) for i in range(6)]
    width = round(frames[0].width * height / frames[0].height)
    sheet = contact_sheet([f.resize((width, height), Image.LANCZOS) for f in frames], reference)
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(path, title, bench, result, sheets, sort):
    """result and sheets: what metrics.score_folder returns."""
    def escape(text):
        return html.escape(str(text), quote=True)
    figures = []
    for name, sheet in sheets.items():
        scores = {k: v for k, v in result["videos"][name].items() if k != "pairs"}
        shown = "".join(f"<span>{escape(k)} {v:.2f}</span>" for k, v in scores.items() if v is not None)
        figures.append(f'<figure id="{escape(name)}" data-scores="{escape(json.dumps(scores))}">'
                       f'<img alt="{escape(name)}" src="{sheet}"><figcaption>'
                       f"<b>{escape(name)}</b> {escape(bench[name]['prompt'])}<br>{shown}</figcaption></figure>")
    metrics = dict.fromkeys(k for v in result["videos"].values() for k in v if k != "pairs")
    write(path, PAGE.format(
        title=escape(title), figures="\n".join(figures), sort=json.dumps(sort), problems=len(result["unusable"]),
        table="".join(f"<tr><td>{escape(k)}<td>{v['value']:.2f}<td>{v['n']}" for k, v in result["table"].items() if v),
        options="".join(f"<option>{escape(k)}</option>" for k in metrics),
        unusable="".join(f"<li>{escape(k)}: {escape(v)}" for k, v in result["unusable"].items())))
