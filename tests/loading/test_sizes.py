"""Images resized and cropped as trainers do, with and without aspect buckets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.loading.sizes import bucket_list, resized
from tests.loading.test_images import save_pictures

MODES = transforms.InterpolationMode


def picture(height, width, seed=0):
    """A smooth image with noise, RGB."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(rows / 3 + np.arange(3)[:, None, None]) + np.cos(columns / 5)
    pixels = 128 + 50 * waves + generator.normal(0, 10, (3, height, width))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("size", [(20, 20), (20, 31), (25, 16), (6, 9), (8, 40)])
@pytest.mark.parametrize("how", [None, "bilinear", "bicubic", "lanczos"])
def test_a_square_as_the_plain_scripts_of_diffusers(size, how):
    """To the bit: ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` of PIL images."""
    steps = [
        transforms.Resize(8, interpolation=MODES(how or "bilinear")),
        transforms.CenterCrop(8),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    form, image = Form(3, (8, 8), 8, interpolation=how), picture(*size)
    assert torch.equal(form.tensor(image, ""), transforms.Compose(steps)(image))
    whole = steps[0](image)
    corner = [max(0, round((side - 8) / 2.0)) for side in (whole.height, whole.width)]
    assert form.corner_of(*size) == tuple(corner)
    # floating point takes the same way, but for rounding to bytes
    x = transforms.functional.to_tensor(image) * 2 - 1
    assert (form.sized(x, "") - form.tensor(image, "")).abs().max() < 2.1 / 255


@pytest.mark.parametrize("size", [(20, 20), (20, 31), (40, 16), (6, 9), (17, 23)])
@pytest.mark.parametrize("place", [None, (0.0, 0.0), (0.999, 0.4)])
def test_listed_buckets_as_the_scripts_of_diffusers(size, place):
    """The nearest aspect ratio, by products; covered; bilinear; cropped in the middle or not."""
    buckets, (height, width) = [(8, 8), (8, 16), (16, 8), (8, 12)], size
    ratios = [abs(height * w - width * h) for h, w in buckets]
    target = buckets[max(n for n in range(4) if ratios[n] == min(ratios))]
    scale = max(target[0] / height, target[1] / width)
    whole = [round(height * scale), round(width * scale)]
    image = picture(*size)
    large = transforms.functional.resize(image, whole, interpolation=MODES.BILINEAR)
    if place is None:
        cropped = transforms.functional.center_crop(large, target)
    else:
        rest = [a - b for a, b in zip(whole, target, strict=True)]
        corner = [int(z * (more + 1)) for z, more in zip(place, rest, strict=True)]
        cropped = transforms.functional.crop(large, *corner, *target)
    x = transforms.functional.normalize(transforms.functional.to_tensor(cropped), [0.5], [0.5])
    form = Form(3, (8, 8), None, buckets=buckets)
    assert torch.equal(form.tensor(image, "", place), x)
    assert Form(3, None, 4, buckets="8,8; 8,16;16,8;8,12") == Form(3, None, 4, buckets=buckets)


# what training_utils of diffusers 0.42 computed: the resolution, the image, its bucket
MADE = [
    (512, (768, 1024), (448, 592)),
    (1024, (4000, 900), (1456, 720)),
    (1024, (300, 317), (304, 304)),
    (768, (1080, 1920), (576, 1024)),
    (640, (333, 1000), (416, 816)),
    (1024, (2000, 1333), (1248, 832)),
    (512, (20, 9), (16, 16)),
    (1024, (1250, 1000), (1152, 912)),
]


@pytest.mark.parametrize(("resolution", "size", "bucket"), MADE)
def test_buckets_that_the_scripts_of_diffusers_make(resolution, size, bucket):
    form = Form(3, (8, 8), resolution, 8, "auto")
    whole, part = form.placed("", size)
    assert part == bucket
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    assert whole == (round(size[0] * scale), round(size[1] * scale))


# what ai-toolkit (commit 27a03a91) computed: resolution and step, the image, resized to, its bucket
TOOLKIT = [
    ((512, 16), (768, 1024), (448, 598), (448, 576)),
    ((1024, 32), (4000, 900), (2176, 490), (2176, 480)),
    ((1024, 16), (300, 317), (304, 322), (304, 320)),
    ((768, 32), (1080, 1920), (576, 1024), (576, 1024)),
    ((512, 16), (9, 20), (16, 36), (16, 16)),
    ((512, 32), (2000, 12), (5334, 32), (1984, 32)),
]


@pytest.mark.parametrize(("options", "size", "whole", "bucket"), TOOLKIT)
def test_buckets_of_ai_toolkit(options, size, whole, bucket):
    form = Form(3, (8, 8), options[0], 8, "ai-toolkit", options[1])
    assert form.placed("", size) == (whole, bucket)
    assert (form.told_size(size), form.corner_of(*size)) == (bucket, (0, 0))


@pytest.mark.parametrize("size", [(40, 40), (40, 90), (91, 40), (40, 50), (10, 95), (37, 52)])
def test_buckets_of_onetrainer(size):
    """Areas of a square in nine ratios, both ways; the nearest ratio, though not by products."""
    buckets = []
    for ratio in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4):
        short, long = (8 * round(64 * z / 8) for z in (ratio**-0.5, ratio**0.5))
        buckets += [(short, long), (long, short)]
    distances = [abs(h / w - size[0] / size[1]) for h, w in buckets]
    part = buckets[distances.index(min(distances))]
    scale = max(part[0] / size[0], part[1] / size[1])
    form = Form(3, None, 64, 8, "onetrainer", 8)
    whole, found = form.placed("", size)
    assert (whole, found) == (tuple(round(side * scale) for side in size), part)
    assert form.corner_of(*size) == tuple((a - b) // 2 for a, b in zip(whole, part, strict=True))


def test_resizing_of_ai_toolkit():
    """Bicubic, by Pillow, and cut from the middle; an odd pixel stays at the end."""
    image, form = picture(40, 71), Form(3, None, 32, 8, "ai-toolkit", 8)
    (height, width), (down, across) = form.placed("", (40, 71))
    assert ((height, width), (down, across)) == ((24, 43), (24, 40))
    large = image.resize((width, height), Image.Resampling.BICUBIC)
    x = transforms.functional.to_tensor(large.crop((1, 0, 41, 24)))
    assert torch.equal(form.tensor(image, ""), transforms.functional.normalize(x, [0.5], [0.5]))


# what sd-scripts (commit 48d368f) computed: its options, the image, resized to, bucket, corner told
KOHYA = [
    ((512, 64, 256, 1024, False), (768, 1024), (448, 597), (448, 576), (8, 0)),
    ((512, 64, 256, 1024, False), (1000, 300), (853, 256), (832, 256), (0, 3)),
    ((512, 64, 256, 1024, False), (3000, 200), (3840, 256), (1024, 256), (0, 93)),
    ((512, 64, 256, 1024, False), (640, 384), (640, 384), (640, 384), (0, 0)),
    ((512, 64, 256, 1024, False), (100, 90), (569, 512), (512, 512), (0, 25)),
    ((1024, 64, 256, 1024, False), (1333, 2000), (704, 1056), (704, 1024), (10, 0)),
    ((1024, 64, 256, 2048, False), (600, 2400), (512, 2048), (512, 2048), (0, 0)),
    ((512, 64, 250, 1000, False), (481, 763), (403, 640), (384, 640), (0, 15)),
    ((512, 64, 256, 1024, True), (768, 1024), (384, 512), (384, 512), (0, 0)),
    ((512, 64, 256, 1024, True), (300, 417), (300, 417), (256, 384), (0, 14)),
    ((1024, 64, 256, 1024, True), (1333, 2000), (832, 1248), (832, 1216), (10, 0)),
    ((512, 32, 256, 1024, True), (1601, 701), (731, 320), (704, 320), (0, 5)),
    ((512, 64, 256, 1024, True), (4000, 257), (1992, 128), (1984, 128), (0, 0)),
]


@pytest.mark.parametrize(("options", "size", "whole", "bucket", "told"), KOHYA)
def test_buckets_of_kohyas_scripts(options, size, whole, bucket, told):
    resolution, *others = options
    form = Form(3, (8, 8), resolution, 8, True, *others)
    assert form.placed("", size) == (whole, bucket)
    assert form.corner_of(*size) == form.corner_of(*size, (0.9, 0.9)) == told


@pytest.mark.parametrize("size", [(20, 31), (31, 20), (9, 40)])
def test_the_square_of_kohyas_scripts_is_a_bucket(size):
    """Without buckets they have one, for which images are resized and told as for others."""
    image, limits = picture(*size), {"bucket_step": 16, "bucket_min": 16, "bucket_max": 16}
    square, bucket = Form(3, None, 16, 8, "square"), Form(3, None, 16, 8, True, **limits)
    assert square.placed("", size) == bucket.placed("", size)
    assert torch.equal(square.tensor(image, ""), bucket.tensor(image, ""))
    assert square.corner_of(*size) == bucket.corner_of(*size) != Form(3, None, 16).corner_of(*size)


def test_resizing_of_kohyas_scripts():
    """What ``cv2.resize`` (OpenCV 5.0) gives with ``INTER_AREA`` and ``INTER_LINEAR``; crops."""
    wave = Image.fromarray((np.arange(35).reshape(5, 7) ** 2 % 256).astype(np.uint8))
    area = [[22, 37, 56, 82], [177, 54, 83, 147], [106, 109, 81, 140]]
    assert np.asarray(resized(wave, (3, 4), None, True)).tolist() == area
    even = Image.fromarray((np.arange(64).reshape(8, 8) ** 2 % 256).astype(np.uint8))
    area = [[37, 59, 89, 127], [53, 139, 105, 143], [69, 155, 121, 159], [85, 107, 137, 111]]
    assert np.asarray(resized(even, (4, 4), None, True)).tolist() == area
    corner = Image.fromarray(np.array([[0, 1], [49, 64]], np.uint8))
    linear = [[0, 0, 1], [12, 14, 17], [37, 42, 48], [49, 56, 64]]
    found = np.asarray(resized(corner, (4, 3), "bilinear", True)).astype(int)
    assert abs(found - linear).max() <= 1  # OpenCV computes in whole numbers
    large = resized(wave, (6, 7), None, True)
    assert large == wave.resize((7, 6), Image.Resampling.LANCZOS)
    # an odd number of pixels is left over, of which the smaller half is above
    form, image = Form(3, None, 256, buckets=True), picture(257, 401)
    assert form.placed("", (257, 401)) == ((256, 399), (256, 256))
    whole = transforms.functional.to_tensor(resized(image, (256, 399), None, True))
    assert torch.equal(form.tensor(image, ""), (whole[:, :, 71 : 71 + 256] - 0.5) / 0.5)
    assert torch.equal(form.tensor(image, "", (0, 1)), (whole[:, :, 143:] - 0.5) / 0.5)


def folder_of(path, *sizes, exif=None):
    path.mkdir()
    for n, size in enumerate(sizes):
        picture(*size, seed=n).save(path / f"i{n}.png", exif=exif or Image.Exif())
    return path


def test_shapes_are_known_before_pixels_are_read(tmp_path, monkeypatch):
    """Of files, saved data sets, arrays and images; the same as those that are loaded."""
    sizes = [(20, 30), (31, 20), (16, 16), (22, 30)]
    form = Form(3, None, None, buckets=[(8, 8), (8, 12), (12, 8)])
    folder = folder_of(tmp_path / "data", *sizes)
    files = [str(path) for path in sorted(folder.iterdir())]
    save_pictures(tmp_path / "saved", {"image": files}, "image")
    np.savez(tmp_path / "bytes.npz", images=np.zeros((2, 20, 30, 3), np.uint8))
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 3, 20, 30)))
    for given, expected in (
        (folder, [(8, 12), (12, 8), (8, 8), (8, 12)]),
        (tmp_path / "saved", [(8, 12), (12, 8), (8, 8), (8, 12)]),
        (tmp_path / "bytes.npz", [(8, 12)] * 2),
        (tmp_path / "floats.npz", [(8, 12)] * 2),
        ([picture(20, 30), picture(31, 20)], [(8, 12), (12, 8)]),
        ([torch.zeros(3, 31, 20)], [(12, 8)]),
    ):
        images = open_images(given, form)
        with monkeypatch.context() as patch:
            patch.setattr(Form, "tensor", None)
            patch.setattr(Form, "sized", None)
            assert images.shapes == expected
        assert [tuple(images[n]["x0"].shape[1:]) for n in range(len(images))] == expected
    assert "4 images, 3 buckets (2 of 8×12, 1 of 12×8, 1 of 8×8)" in (
        open_images(folder, form).summary()
    )
    assert open_images(folder, Form(3, None, 8)).shapes is None


def test_what_stands_beside_an_image_has_its_bucket(tmp_path):
    """Sizes for Stable Diffusion XL, and masks, whatever size these have."""
    folder = folder_of(tmp_path / "data", (20, 30))
    (folder / "masks").mkdir()
    picture(31, 21, seed=7).convert("L").save(folder / "masks" / "m.png")
    line = '{"file_name": "i0.png", "text": "a", "mask_image_file_name": "masks/m.png"}'
    (folder / "metadata.jsonl").write_text(line)
    condition = Condition("prompt", sizes=True, images={"mask_image": 1})
    form = Form(3, None, None, buckets=[(12, 16)])
    item = open_images(folder, form, condition)[0]
    assert item["original_size"].tolist() == [20, 30]
    assert item["crops_coords_top_left"].tolist() == [0, 1]
    mask = Image.open(folder / "masks" / "m.png").resize((18, 12), Image.Resampling.BILINEAR)
    expected = transforms.functional.to_tensor(mask)[:, :, 1:17]
    assert torch.allclose(item["mask_image"], expected, atol=1e-6)


def test_kohyas_scripts_do_not_turn_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = folder_of(tmp_path / "data", (260, 520), exif=exif)
    turned = open_images(folder, Form(3, None, None, buckets=[(4, 8), (8, 4)]))
    with pytest.warns(UserWarning, match="images are turned as their EXIF orientation says"):
        assert turned[0]["x0"].shape == (3, 8, 4)
    stored = open_images(folder, Form(3, None, 320, buckets=True))
    assert stored[0]["x0"].shape[1:] == stored.shapes[0] == (256, 384)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": True}, "`buckets` needs the `resolution` that training had"),
        ({"buckets": "auto"}, "`buckets` needs the `resolution` that training had"),
        ({"buckets": []}, r"`buckets` must be True for those of kohya's scripts, square, a"),
        ({"buckets": "64x64"}, r"or '672,1568;…', got '64x64'"),
        ({"buckets": [(0, 8)]}, r"got \[\(0, 8\)\]"),
        ({"buckets": [(8, 12), (16, 8)], "multiple": 8}, "multiples of 8, .* got 8×12"),
        ({"buckets": True, "resolution": 2048}, "`resolution` must be from 256 to 1024, .* got"),
        ({"buckets": True, "resolution": 64, "bucket_min": 32}, "`bucket_min` .*, got 32 and 64"),
        ({"buckets": True, "resolution": 512, "bucket_step": 4, "multiple": 8}, "multiple of 8"),
        ({"resolution": 0}, "`resolution` must be a whole number of at least 1"),
        ({"interpolation": "area"}, "`interpolation` must be one of bilinear, bicubic, lanczos"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Form(**{"channels": 3, "size": None, "resolution": None, **options})


def test_an_image_that_fills_no_bucket():
    form = Form(3, None, 512, buckets=True, bucket_no_upscale=True)
    with pytest.raises(ValueError, match=r"'a.png' has no bucket: it is 50×900 pixels, of which"):
        form.tensor(picture(50, 900), "a.png")
    assert bucket_list("false") is False


def test_a_form_is_written_down_and_read_again():
    for options in ({"resolution": 512, "buckets": True, "bucket_max": 2048}, {"buckets": "8,8"}):
        form = Form(**{"channels": 3, "size": None, "resolution": None, **options})
        assert Form(size=None, **form.told) == form
    assert Form(3, (8, 8), None, 8).told == {"channels": 3, "resolution": None}
