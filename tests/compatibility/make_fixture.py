"""Makes 1e24f73.tar.xz: run folders and latents that commit 1e24f73 writes, and recorded.json, what it then computes.

    git worktree add ../at_1e24f73 1e24f73
    python tests/compatibility/make_fixture.py ../at_1e24f73

The autoencoder run ends after three steps and can be trained longer; the diffusion run (two ranks, ZeRO-3, averaged weights,
a text encoder) stops half-way with status 75; the latents between them are complete. recorded.json holds the losses of the
steps after that and outputs of load, build and sample, all by the code of that checkout. The commands run in Linux
namespaces of their own, where the folder is mounted at /mnt and the host is called localhost, so that no path or name of the
machine enters the archive. The indexes of shards are caches with absolute paths and are left out.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ARCHIVE = Path(__file__).with_name("1e24f73.tar.xz")
FOLDERS = ("images", "autoencoder", "latents", "diffusion")
LEFT_OUT = (".ldmscale_index",)
MOUNTED = "/mnt"  # where the folder seems to be for the commands
NAMESPACES = ["unshare", "--user", "--map-root-user", "--uts", "--mount", "sh", "-c"]
ENTER = f'hostname localhost; mount --bind "$0" {MOUNTED}; cd {MOUNTED}; exec "$@"'
# Latents are of files of one size and modification time, in nanoseconds.
IMAGES_TIME = 1_700_000_000_000_000_000

# As small as the configuration allows: networks of two channels, images of 16 pixels.
AUTOENCODER_SIZE = [
    "autoencoder.channels=2", "autoencoder.norm_groups=2", "autoencoder.channel_mult=[1,1]", "autoencoder.latent_channels=2",
    "autoencoder.mid_attention=true",
]  # fmt: skip
# All weights are sharded: by default those under 100,000 elements stay whole at stage 3.
SHARDED = ["zero=3", "zero.persistence_threshold=0"]
AUTOENCODER = [
    "autoencoder", "experiment=smoke", "data=shards", "data.shards='images/*.tar'", "data.image_size=16", "data.workers=0",
    "data.max_bad_share=0.5", "run.dir=autoencoder", *AUTOENCODER_SIZE, "loss.discriminator_channels=2",
    "loss.discriminator_layers=1", "loss.gan_start_step=1", "scale_samples=8", "train.global_batch=8",
    "train.rank_micro_batch=2", "checkpoint.save_every_steps=100",
]  # fmt: skip
LATENTS = [
    "latents", "data=shards", "data.shards='images/*.tar'", "data.image_size=16", "data.workers=0", "data.max_bad_share=0.5",
    "first_stage.path=autoencoder", "latents.path=latents",
]  # fmt: skip
DIFFUSION = [
    "diffusion", "experiment=smoke", "data=latents", "data.workers=0", "data.shards='latents/*.tar'",
    "first_stage.path=autoencoder", *AUTOENCODER_SIZE, "unet.channels=2", "unet.channel_mult=[1,1]",
    "unet.attention_levels=[1]", "unet.heads=1", "unet.context_dim=8", "unet.norm_groups=2", "unet.in_channels=2",
    "unet.out_channels=2", "text_encoder.width=8", "text_encoder.layers=1", "text_encoder.heads=1",
    "text_encoder.head_channels=8", "text_encoder.vocab_size=48", "text_encoder.max_tokens=6",
    "text_encoder.feedforward_mult=1", "optim.lr=1e-3", "train.global_batch=8", "train.rank_micro_batch=2",
    "checkpoint.save_every_steps=100",
]  # fmt: skip
# Each start makes one step, saves and ends with 75.
STOP = ["run.max_hours=1e-5"]
AUTOENCODER_STEPS = (3, 5)  # of the archive, and of the resumed run
DIFFUSION_STEPS = (2, 5)
WHOLE = ["zero=0", "train.rank_micro_batch=8"]


def autoencoder(steps: int) -> list[str]:
    """The command that makes, or resumes, the autoencoder run."""
    return [*AUTOENCODER, *SHARDED, f"train.max_steps={steps}"]


def diffusion(steps: int, folder: str = "diffusion") -> list[str]:
    """The command that makes, or resumes, the diffusion run on two ranks at ZeRO-3."""
    return [*DIFFUSION, *SHARDED, f"run.dir={folder}", f"train.max_steps={steps}"]


def losses(run: Path) -> dict[str, float]:
    """The loss of each step of a run; a step that was repeated after a resume has its newest."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(line["step"]): line["loss/total"] for line in lines if "loss/total" in line}


class Checkout:
    """Runs the code of another commit in `folder`."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(checkout), str(Path(__file__).parent)]),
            "PYTHON": sys.executable,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }

    def run(self, arguments: Sequence[str], ranks: int | None = None, status: int = 0) -> None:
        start = [sys.executable, "-m", "ldmscale"]
        if ranks is not None:
            start = [str(self.checkout / "launch" / "local.sh"), "-n", str(ranks), "--cpu"]
        self._start([*start, *arguments], status)

    def outputs(self, expression: str) -> object:
        """The value of an expression over the functions of recorded_outputs.py."""
        code = f"import json; from pathlib import Path; import recorded_outputs as of; print(json.dumps({expression}))"
        return json.loads(self._start([sys.executable, "-c", code], 0).splitlines()[-1])

    def _start(self, command: Sequence[str], status: int) -> str:
        done = subprocess.run(
            [*NAMESPACES, ENTER, str(self.folder), *command],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != status:
            raise SystemExit(
                f"{' '.join(command)}: status {done.returncode}, expected {status}\n{done.stdout}\n{done.stderr}"
            )
        return done.stdout


def write_images(folder: Path) -> None:
    """Two shards of twelve captioned 16 px images; the fifth of the second shard is damaged and enters the ledger."""
    from PIL import Image

    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (250, 250, 250)}
    boxes = {"square": (4, 4, 12, 12), "bar": (1, 6, 15, 10), "post": (6, 1, 10, 15)}
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(12):
                number = shard * 12 + place
                colour, shape = list(colours)[number % 4], list(boxes)[number // 4 % 3]
                image = Image.new("RGB", (16, 16), (10 * number, 20, 40))
                image.paste(colours[colour], boxes[shape])
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                png = buffer.getvalue()[:40] if number == 16 else buffer.getvalue()
                for ending, content in (("png", png), ("txt", f"a {colour} {shape}".encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.utime(tar.name, ns=(IMAGES_TIME, IMAGES_TIME))


def make(old: Checkout) -> dict[str, object]:
    """Write the folders of the archive and return what is recorded."""
    folder = old.folder
    write_images(folder / "images")
    old.run(autoencoder(AUTOENCODER_STEPS[0]), ranks=2)
    old.run(LATENTS, ranks=2)
    for _ in range(DIFFUSION_STEPS[0]):
        old.run([*diffusion(DIFFUSION_STEPS[1]), *STOP], ranks=2, status=75)
    for step in range(1, DIFFUSION_STEPS[0]):
        shutil.rmtree(folder / "diffusion" / "checkpoints" / f"step_{step:08d}")
    recorded: dict[str, object] = {
        "autoencoder": old.outputs("of.of_autoencoder(Path('autoencoder'))"),
        "diffusion": old.outputs("of.of_diffusion(Path('diffusion'))"),
        "build": old.outputs("of.of_build()"),
    }
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    old.run(diffusion(DIFFUSION_STEPS[1]), ranks=2)
    recorded["losses_diffusion"] = losses(folder / "diffusion")
    recorded["resumed_diffusion"] = old.outputs("of.of_diffusion(Path('diffusion'))")
    old.run([*DIFFUSION, *WHOLE, "run.dir=fresh", "train.max_steps=2"])
    recorded["losses_fresh"] = losses(folder / "fresh")
    old.run(autoencoder(AUTOENCODER_STEPS[1]), ranks=2)
    recorded["losses_autoencoder"] = losses(folder / "autoencoder")
    recorded["resumed_autoencoder"] = old.outputs("of.of_autoencoder(Path('autoencoder'))")
    recorded["latent_statistics"] = old.outputs("of.ldmscale.load('autoencoder').latent_statistics")
    shutil.rmtree(folder)
    kept.rename(folder)
    return recorded


def pack(folder: Path, recorded: dict[str, object]) -> None:
    """Write the archive: names in order, no owners, times of 1970."""
    (folder / "recorded.json").write_text(json.dumps(recorded))
    files = [path for name in FOLDERS for path in sorted((folder / name).rglob("*")) if path.is_file()]
    kept = [path for path in files if not set(path.parts) & set(LEFT_OUT)]
    with tarfile.open(ARCHIVE, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
        for path in [folder / "recorded.json", *kept]:
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(member, file)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs"
        folder.mkdir()
        pack(folder, make(Checkout(Path(sys.argv[1]).resolve(), folder)))
    sys.stdout.write(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
