"""The page, in a browser."""

import json

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from tests.chromium import Page, needs_chromium


@needs_chromium
def test_the_page_in_a_browser(server, tmp_path):
    with Page(tmp_path / "profile") as page:
        page.look(1200, 800)
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait("state.about")
        page.choose_file("#file", str(server.images[0]))
        page.wait("state.answer")
        page.eval("const s = document.getElementById('score'); s.value = 0; s.dispatchEvent(new Event('input'))")
        answer = server.json("POST", "/api/predict", server.images[0].read_bytes())[1]
        shown = json.loads(page.eval("document.getElementById('json').textContent"))
        assert shown["detections"] == answer["detections"] and len(shown["detections"]) > 1
        assert "64 x 64 pixels" in page.eval("document.getElementById('status').textContent")
        whole = page.eval("document.getElementById('canvas').toDataURL()")

        # By score, by class, and by level.
        page.eval("s.value = 1; s.dispatchEvent(new Event('input'))")
        assert page.eval("document.getElementById('shown').textContent").startswith("Objects: 0 of")
        assert page.eval("document.getElementById('canvas').toDataURL()") != whole
        page.eval("s.value = 0; s.dispatchEvent(new Event('input'))")
        assert page.eval("document.getElementById('canvas').toDataURL()") == whole
        label = answer["detections"][0]["category"]
        page.eval(f"document.querySelector('input[name=class][value={label}]').click()")
        left = [one for one in answer["detections"] if one["category"] != label]
        assert json.loads(page.eval("document.getElementById('json').textContent"))["detections"] == left
        page.eval(f"document.querySelector('input[name=class][value={label}]').click()")
        page.eval("document.querySelector('input[value=level]').click()")
        assert page.eval("document.getElementById('canvas').toDataURL()") != whole
        level = answer["detections"][0]["level"]
        count = sum(one["level"] == level for one in answer["detections"])
        assert f"p{level} ({count})" in page.eval("document.getElementById('levels').textContent")
        page.eval("document.getElementById('show-maps').click()")
        page.wait("document.querySelectorAll('#maps img').length === 5")
        page.wait("[...document.querySelectorAll('#maps img')].every(i => i.complete && i.naturalWidth)")

        # Masks are decoded as pycocotools does it.
        mask = np.zeros((37, 53), np.uint8)
        mask[5:30, 7:40] = 1
        mask[::3, ::5] ^= 1
        rle = mask_util.encode(np.asfortranarray(mask))
        sent = json.dumps({"size": rle["size"], "counts": rle["counts"].decode()})
        painted = page.eval(
            "(() => { const canvas = new OffscreenCanvas(53, 37), context = canvas.getContext('2d');"
            f" drawMask(context, {sent}, [255, 0, 0]);"
            " const found = [], pixels = context.getImageData(0, 0, 53, 37).data;"
            " for (let i = 3; i < pixels.length; i += 4) found.push(pixels[i] ? 1 : 0);"
            " return found; })()"
        )
        np.testing.assert_array_equal(np.reshape(painted, (37, 53)), mask)

        # Wide and narrow, light and dark.
        for width in (1200, 390):
            for dark in (False, True):
                page.look(width, 800, dark)
                page.wait(f"innerWidth === {width}")
                assert page.too_wide() == []
                page.picture(tmp_path / "page.png")
                corner = Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
                assert corner < 60 if dark else corner > 200

        # What is no image is said, and the page goes on.
        (tmp_path / "no.jpg").write_text("no image")
        page.choose_file("#file", str(tmp_path / "no.jpg"))
        page.wait("document.querySelector('#status.wrong')")
        assert "no image of a known kind" in page.eval("document.getElementById('status').textContent")
        page.choose_file("#file", str(server.images[1]))
        name = json.dumps(server.images[1].name)
        page.wait(f"!document.querySelector('#status.wrong') && state.file.name === {name}")
        assert [text for text in page.messages if "415" not in text] == []
        own = (f"http://127.0.0.1:{server.port}/", "data:", "blob:")
        assert page.requests and all(address.startswith(own) for address in page.requests)
