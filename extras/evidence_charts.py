"""Line charts with bands, drawn with PIL: the pictures of evidence.py."""
import statistics

from PIL import Image, ImageDraw, ImageFont

BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)
RED, PURPLE = (214, 39, 40), (148, 103, 189)
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE)
GRAY, BLACK = (200, 200, 200), (40, 40, 40)

SHARP = 2                      # drawn larger, then made smaller: lines without steps
WIDTH, HEIGHT = 520, 320       # of a chart
LEFT, RIGHT = 42, WIDTH - 20   # of its axes
TOP, BOTTOM = 28, HEIGHT - 42


class Chart:
    """A picture with axes: x from 0 to `x_end`, y from `y_start` to 1."""

    def __init__(self, title, x_label, x_end, y_start=0.5):
        self.x_end = x_end
        self.y_start = y_start
        self.names = []
        size = (WIDTH * SHARP, HEIGHT * SHARP)
        self.picture = Image.new("RGB", size, "white")
        self.draw = ImageDraw.Draw(self.picture, "RGBA")
        self.font = ImageFont.load_default(12 * SHARP)
        self.draw_axes()
        self.text(WIDTH / 2, 8, title, "mt")
        self.text(WIDTH / 2, HEIGHT - 8, x_label, "mb")

    def draw_axes(self):
        for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
            value = self.y_start + (1 - self.y_start) * share
            ends = [(0, value), (self.x_end, value)]
            self.stroke(ends, GRAY, 1)
            _, y = self.place(0, value)
            self.text(LEFT - 6, y, f"{value:.1f}", "rm")
        for share in (0, 0.25, 0.5, 0.75, 1):
            value = self.x_end * share
            x, _ = self.place(value, self.y_start)
            self.text(x, BOTTOM + 5, f"{value:.0f}", "mt")

    def place(self, x, y):
        """Where a point of the data lies; one below the axes lies on their edge."""
        right = x / self.x_end
        up = (y - self.y_start) / (1 - self.y_start)
        up = max(0, up)
        across = LEFT + (RIGHT - LEFT) * right
        down = BOTTOM - (BOTTOM - TOP) * up
        return across, down

    def pixels(self, points):
        places = [self.place(x, y) for x, y in points]
        return [(x * SHARP, y * SHARP) for x, y in places]

    def text(self, x, y, text, anchor):
        where = (x * SHARP, y * SHARP)
        self.draw.text(where, text, BLACK, self.font, anchor)

    def stroke(self, points, color, width):
        self.draw.line(self.pixels(points), color, width * SHARP, "curve")

    def line(self, name, xs, columns):
        """The mean of several values at each x, in the band from the lowest to the highest."""
        color = COLORS[len(self.names) % len(COLORS)]
        lowest = [min(values) for values in columns]
        highest = [max(values) for values in columns]
        means = [statistics.mean(values) for values in columns]
        there = list(zip(xs, lowest))
        back = list(zip(xs, highest))[::-1]
        self.draw.polygon(self.pixels(there + back), (*color, 40))
        self.stroke(list(zip(xs, means)), color, 2)
        self.legend(name, color)

    def legend(self, name, color):
        y = BOTTOM - 14 - 15 * len(self.names)
        corners = [(RIGHT - 12, y - 4), (RIGHT - 6, y + 4)]
        corners = [(x * SHARP, y * SHARP) for x, y in corners]
        self.draw.rectangle(corners, color)
        self.text(RIGHT - 18, y, name, "rm")
        self.names.append(name)

    def finished(self):
        return self.picture.resize((WIDTH, HEIGHT), Image.LANCZOS)


def draw_panels(panels, path):
    """Two rows of charts, one for each {name: its runs}."""
    columns = (len(panels) + 1) // 2
    sheet = Image.new("RGB", (columns * WIDTH, 2 * HEIGHT), "white")
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        picture = panel_of(panel)
        sheet.paste(picture, (column * WIDTH, row * HEIGHT))
    sheet.save(path)


def panel_of(panel):
    """The evaluation over what it cost, with a line for each name."""
    lines = {}
    for name, runs in panel.items():
        cost = runs[0]["cost"]
        xs = [iteration * cost for iteration, *_ in runs[0]["evals"]]
        values = [[value for _, value, _ in run["evals"]] for run in runs]
        lines[name] = xs, list(zip(*values))
    end = max(xs[-1] for xs, _ in lines.values())
    label = "network evaluations per image, forward 1, backward 2"
    chart = Chart("evaluation", label, end)
    for name, (xs, columns) in lines.items():
        chart.line(name, xs, columns)
    return chart.finished()


def draw_learning(samples, runs, path):
    """The first and the last samples of a run, and a line for each seed."""
    title = "evaluation: share of colour, shape and side right"
    end = runs[0]["evals"][-1][0]
    chart = Chart(title, "iteration", end)
    for run in runs:
        xs = [iteration for iteration, _, _ in run["evals"]]
        columns = [[value] for _, value, _ in run["evals"]]
        chart.line(f"seed {run['seed']}", xs, columns)
    before = Image.open(samples[0])
    after = Image.open(samples[-1])
    side_by_side([before, after, chart.finished()], path)


def side_by_side(pictures, path):
    """As high as a chart."""
    scaled = []
    for picture in pictures:
        width = picture.width * HEIGHT // picture.height
        scaled.append(picture.resize((width, HEIGHT), Image.LANCZOS))
    width = sum(picture.width for picture in scaled)
    sheet = Image.new("RGB", (width, HEIGHT), "white")
    x = 0
    for picture in scaled:
        sheet.paste(picture, (x, 0))
        x += picture.width
    sheet.save(path)
