#!/usr/bin/env python3
"""tools/chart and tools/rivals: the chart's bars and table from small files, and what they refuse.

Usage: test_chart.py FOLDER_OF_TOOLS
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as xml

TOOLS = sys.argv.pop(1)
SVG = "{http://www.w3.org/2000/svg}"

GPU = {
    "date": "2026-11-22T20:00:00Z",
    "machine": {"gpu": "Example GPU", "driver": "1.2", "cuda": "13.0"},
    "rows": [
        {"id": "a", "work": "x < y | z", "us": 100.0, "floor_us": 50.0, "rival": "here", "rival_us": 400.0},
        {"id": "b", "us": 10.0, "floor_us": 9.0, "ratio": "rival", "first_ratio": 0.5, "then_ratio": 0.2, "bar": "no"},
        {"id": "c", "us": 2000.0, "bytes_per_second": 53.06e9, "first_us": 2100.0, "then_us": 1900.0, "bar": "first"},
        {"id": "d", "us": 20.0, "floor_us": 16.0, "ratio": "floor", "first_ratio": 0.75, "bar": "first"},
        {"id": "aside", "us": 1e6, "floor_us": 1.0},
    ],
}
RIVALS = {
    "machine": {"torch": "9.9"},
    "rows": [
        {"id": "a", "rival": "elsewhere", "us": 200.0},
        {"id": "b", "rival": "slow", "us": 100.0},
        {"id": "b", "rival": "fast", "us": 25.0},
        {"id": "nobody", "rival": "lost", "us": 1.0},
    ],
}


class Chart(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def write(self, name, content):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
        return path

    def run_chart(self, *arguments):
        command = [sys.executable, os.path.join(TOOLS, "chart"), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)

    def table(self, gpu, rivals=None):
        paths = [self.write("gpu.json", gpu)] + ([self.write("rivals.json", rivals)] if rivals else [])
        done = self.run_chart("--table", *paths)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
        return {line.split(" | ")[0][2:]: line for line in lines[2:]}, done

    def refuses(self, status, *arguments):
        done = self.run_chart(*arguments)
        self.assertEqual(done.returncode, status)
        self.assertEqual(done.stdout, "")
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        return done.stderr

    def bars(self, svg, kind):
        bars = [bar for bar in svg.iter(SVG + "rect") if bar.get("class") == kind]
        return [float(bar.get("width")) for bar in bars[1:]]  # the first is the legend's

    def test_bars_are_logarithms(self):
        done = self.run_chart(self.write("gpu.json", GPU), self.write("rivals.json", RIVALS))
        self.assertEqual(done.returncode, 0, done.stderr)
        svg = xml.fromstring(done.stdout)
        a, b, c, d = self.bars(svg, "ours")
        # 10, 100 and 2000 us: a decade is everywhere as long.
        self.assertAlmostEqual((c - b) / (a - b), 2.301, delta=0.01)
        self.assertAlmostEqual((d - b) / (a - b), 0.301, delta=0.01)
        # The fastest rival counts: 200 of 400 and 200, 25 of 100 and 25.
        rivals = self.bars(svg, "rival")
        self.assertEqual(len(rivals), 2)
        self.assertAlmostEqual((rivals[0] - a) / (a - b), 0.301, delta=0.01)
        self.assertAlmostEqual((rivals[1] - b) / (a - b), 0.398, delta=0.01)
        floors = [line for line in svg.iter(SVG + "line") if line.get("class") == "floor"]
        self.assertEqual(len(floors), 3 + 1)  # one is the legend's

    def test_chart_says_what_it_shows(self):
        done = self.run_chart(self.write("gpu.json", GPU), self.write("rivals.json", RIVALS))
        text = "".join(xml.fromstring(done.stdout).itertext())
        for part in ("Example GPU", "PyTorch 9.9", "2026-11-22", "x < y | z", "elsewhere", "fast: 25 us, 2.50x ours"):
            self.assertIn(part, text)
        self.assertNotIn("lost", text)
        self.assertNotIn("aside", text)
        self.assertIn("nobody", done.stderr)

    def test_table(self):
        rows, _ = self.table(GPU, RIVALS)
        self.assertEqual(list(rows), ["a", "b", "c", "d", "aside"])
        self.assertIn("x < y \\| z | 100 us | 50 us | 2.00 | elsewhere 200 us; here 400 us | 2.00 | - |", rows["a"])
        self.assertIn("2000 us (53.1 GB/s)", rows["c"])
        self.assertIn("<= 2100 us, then <= 1900 us: first met", rows["c"])
        self.assertIn(">= 75% of the floor's rate: first met", rows["d"])

    def test_bar_of_a_merged_rival(self):
        self.assertIn("missed", self.table(GPU)[0]["b"])
        # 10 / 25 is within 0.5 and not within 0.2; 10 / 60 is within both.
        self.assertIn("first met", self.table(GPU, RIVALS)[0]["b"])
        rivals = {"rows": [{"id": "b", "rival": "slow", "us": 60.0}]}
        self.assertIn(": met", self.table(GPU, rivals)[0]["b"])

    def test_rivals_alone_are_not_needed(self):
        done = self.run_chart(self.write("gpu.json", {"rows": [{"id": "a", "us": 3}]}))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(self.bars(xml.fromstring(done.stdout), "ours")), 1)

    def test_refuses(self):
        good = self.write("good.json", GPU)
        self.assertIn("nothing.json", self.refuses(1, os.path.join(self.folder, "nothing.json")))
        self.assertIn("not JSON", self.refuses(1, self.write("bad.json", "{")))
        self.assertIn("no rows", self.refuses(1, self.write("list.json", [])))
        self.assertIn("no rows", self.refuses(1, self.write("empty.json", {"rows": []})))
        self.assertIn("'us'", self.refuses(1, self.write("lacks.json", {"rows": [{"id": "a"}]})))
        self.assertIn("not positive", self.refuses(1, self.write("zero.json", {"rows": [{"id": "a", "us": 0}]})))
        self.assertIn("'rival'", self.refuses(1, good, self.write("r.json", {"rows": [{"id": "a", "us": 1}]})))
        self.assertIn("usage", self.refuses(2))
        self.assertIn("usage", self.refuses(2, good, "--tabel"))


class Rivals(unittest.TestCase):
    def test_without_a_gpu_it_says_so(self):
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
        command = [sys.executable, "-B", os.path.join(TOOLS, "rivals", "rivals.py")]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, env=environment, check=False)
        self.assertEqual(done.returncode, 77, done.stderr)
        self.assertIn("rivals: no PyTorch, or no CUDA device for it", done.stderr)


if __name__ == "__main__":
    unittest.main()
