import typing

from tokenrl.control.arguments import (
    ControlArguments as ControlArguments,
    agent_settings as agent_settings,
)
from tokenrl.control.environments import Environments as Environments, describe as describe
from tokenrl.control.evaluation import seed_of as seed_of
from tokenrl.control.policies import Policy as Policy, read_policy as read_policy
from tokenrl.control.rollouts import collect_episodes as collect_episodes
from tokenrl.control.run import ControlResult as ControlResult
from tokenrl.control.worlds import (
    Bandit as Bandit,
    GridWorld as GridWorld,
    Walk as Walk,
)

if typing.TYPE_CHECKING:
    from tokenrl.signatures import (
        train_agent as train_agent,
    )
else:
    from tokenrl.control.training import train_agent as train_agent

"""For other rooms of tokenrl, beside the names above; no promise to users."""

from tokenrl.control.setup import control_settings as control_settings
