# All moves on a branch of its own, a commit each: bash .ci/moves/run.sh [in a clean worktree of main]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
tools=$(mktemp -d)
cp "$here"/*.py "$tools"
for step in scaling outputs models data generation runs trainers evaluation stages; do
  STEP=$step python "$tools/move.py" "$PWD" "$tools/plan.py"
  git add -A && git commit -qm "Gather the files of $step by subject"
done
ruff check .
