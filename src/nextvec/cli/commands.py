"""Imports every module that registers verbs on the app, in the order in which help lists them."""

from nextvec.cli import bakeoff as bakeoff
from nextvec.cli import bench as bench
from nextvec.cli import bound as bound
from nextvec.cli import compare as compare
from nextvec.cli import convert as convert
from nextvec.cli import data as data
from nextvec.cli import demo as demo
from nextvec.cli import env as env
from nextvec.cli import evaluate as evaluate
from nextvec.cli import flops as flops
from nextvec.cli import generate as generate
from nextvec.cli import plan as plan
from nextvec.cli import report as report
from nextvec.cli import serve as serve
from nextvec.cli import show as show
from nextvec.cli import sweep as sweep
from nextvec.cli import train as train
from nextvec.cli import verify as verify
from nextvec.cli import watch as watch
