"""report.html of paper/metrics.py: a contact sheet of each video with its scores, the lowest first.

One file with its pictures inside and no link to anywhere, so it can be mailed.
"""
import base64
import io
from html import escape

from PIL import Image

from common.run import write
from sample import contact_sheet

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:16px}} img{{display:block;max-width:100%}} td{{padding:2px 10px}}</style>
<h1>{title}</h1>
<table><tr><td>metric<td>mean<td>n</tr>{table}</table>
<p>The lowest {sort} first; the first picture is the reference.</p>
{videos}
<h2>{n} problems</h2><ul>{problems}</ul>
"""


def contact_sheet_uri(reference, frames, height=112):
    """The reference and six of the frames in a row, as a data: address of a JPEG."""
    sheet, file = contact_sheet([Image.fromarray(f) for f in frames], reference), io.BytesIO()
    sheet.thumbnail((sheet.width, height))
    sheet.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(path, title, bench, result, sheets, sort):
    """result: what metrics.py writes into results.json; sheets: {id: contact sheet}; sort: the metric to sort by."""
    def order(video):
        score = video[1].get(sort)
        return float("inf") if score is None else score
    videos = []
    for name, scores in sorted(result["videos"].items(), key=order):
        shown = ", ".join(f"{k} {v:.2f}" for k, v in scores.items() if isinstance(v, float))
        videos.append(f'<p><img src="{sheets[name]}"><b>{escape(name)}</b> {escape(bench[name]["prompt"])}<br>{shown}')
    write(path, PAGE.format(
        title=escape(title), sort=escape(sort), videos="\n".join(videos), n=len(result["unusable"]),
        table="".join(f"<tr><td>{k}<td>{v['value']:.2f}<td>{v['n']}" for k, v in result["table"].items() if v),
        problems="".join(f"<li>{escape(k)}: {escape(v)}" for k, v in result["unusable"].items())))
