from tokenrl.files import write_json as write_json
from tokenrl.runs.metric_table import all_metrics as all_metrics
from tokenrl.runs.metrics import read_completions as read_completions, read_metrics as read_metrics
from tokenrl.runs.plots import smooth as smooth
from tokenrl.runs.reader import Outcome as Outcome, RecordedRun as RecordedRun, read_run as read_run
from tokenrl.runs.report import report_from_directory as report_from_directory
from tokenrl.runs.session import Session as Session
from tokenrl.runs.signals import ended_by_itself as ended_by_itself

"""For other rooms of tokenrl, beside the names above; no promise to users."""

from tokenrl.runs.checkpoint import SavingArguments as SavingArguments
from tokenrl.runs.console import Console as Console
from tokenrl.runs.directory import (
    acquire_lock as acquire_lock,
    directory_path as directory_path,
    in_use as in_use,
)
from tokenrl.runs.findings import observe as observe
from tokenrl.runs.markup import write_page as write_page
from tokenrl.runs.metric_table import reaches as reaches
from tokenrl.runs.metrics import TrackerArguments as TrackerArguments
from tokenrl.runs.origin import typed_command as typed_command, versions as versions
from tokenrl.runs.output import (
    duration as duration,
    measured as measured,
    rich_console as rich_console,
    rich_table as rich_table,
)
from tokenrl.runs.plots import Chart as Chart, Forest as Forest
from tokenrl.runs.reader import ENDED as ENDED, state_of as state_of
from tokenrl.runs.report import charts as charts
from tokenrl.runs.resume import (
    ROUNDING as ROUNDING,
    Provenance as Provenance,
    resume_settings as resume_settings,
)
from tokenrl.runs.rules import (
    Finding as Finding,
    Means as Means,
    judge as judge,
)
from tokenrl.runs.side_by_side import HASH as HASH, differences as differences, facts_of as facts_of
from tokenrl.runs.signals import GracefulStop as GracefulStop
from tokenrl.runs.threads import (
    ThreadArguments as ThreadArguments,
    choose_threads as choose_threads,
    using_threads as using_threads,
)
