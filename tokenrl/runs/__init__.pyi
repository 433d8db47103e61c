from tokenrl.runs.files import write_json as write_json
from tokenrl.runs.metric_table import all_metrics as all_metrics
from tokenrl.runs.metrics import read_completions as read_completions, read_metrics as read_metrics
from tokenrl.runs.plots import smooth as smooth
from tokenrl.runs.reader import Outcome as Outcome, RecordedRun as RecordedRun, read_run as read_run
from tokenrl.runs.report import report_from_directory as report_from_directory
from tokenrl.runs.session import Session as Session
from tokenrl.runs.signals import ended_by_itself as ended_by_itself
