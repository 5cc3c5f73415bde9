package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v3"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/state"
)

func (a *app) psCommand() *cli.Command {
	return &cli.Command{
		Name:      "ps",
		Usage:     "ps displays the processes running inside a container",
		ArgsUsage: "<container-id> [ps options]",
		Description: `The processes and their pids are the guest's. They are listed as "ps -ef" lists
them; ps options are accepted, and change nothing. In JSON it is a list of the
pids on the host of the processes that stand for them: the container's own and one
for each that was started in it.`,
		StopOnNthArg: firstArgument(),
		Flags:        []cli.Flag{formatFlag()},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, -1); err != nil {
				return err
			}
			format := cmd.String("format")
			if format != "table" && format != "json" {
				return errors.New("invalid format option")
			}
			id := cmd.Args().First()
			var list []*agentv1.ProcessInfo
			var err error
			pids := []int{}
			if format == "json" {
				// Who reads it looks them up on the host.
				pids, err = a.client.HostPids(ctx, id)
			} else {
				list, err = a.client.Processes(ctx, id)
			}
			if errors.Is(err, client.ErrWrongState) {
				// A container that has stopped has no processes, as with runc.
				if ct, gerr := a.client.Get(id); gerr == nil && ct.Status == state.Stopped {
					err = nil
				}
			}
			if err != nil {
				return err
			}
			if format == "json" {
				return json.NewEncoder(cmd.Root().Writer).Encode(pids)
			}
			return printProcesses(cmd.Root().Writer, list, time.Now())
		},
	}
}

func printProcesses(w io.Writer, list []*agentv1.ProcessInfo, now time.Time) error {
	if _, err := fmt.Fprintln(w, "UID          PID    PPID  C STIME TTY          TIME CMD"); err != nil {
		return err
	}
	for _, p := range list {
		if _, err := fmt.Fprintln(w, processLine(p, now)); err != nil {
			return err
		}
	}
	return nil
}

// processLine is one process as ps -f prints it.
func processLine(p *agentv1.ProcessInfo, now time.Time) string {
	start := time.Unix(p.StartUnix, 0)
	busy := 0
	if life := now.Sub(start); life > 0 {
		busy = min(99, int(100*time.Duration(p.CpuMilliseconds)*time.Millisecond/life))
	}
	stime := start.Format("15:04")
	if now.Sub(start) > 24*time.Hour {
		stime = start.Format("Jan02")
	}
	cpu := time.Duration(p.CpuMilliseconds) * time.Millisecond
	return fmt.Sprintf("%-8s %7d %7d %2d %s %-8s %02d:%02d:%02d %s", guestUser(p.Uid), p.Pid, p.Ppid, busy, stime, printable(p.Tty),
		int(cpu.Hours()), int(cpu.Minutes())%60, int(cpu.Seconds())%60, printable(p.Command))
}

// guestUser is a user of the guest. Only root has the same name everywhere.
func guestUser(uid uint32) string {
	if uid == 0 {
		return "root"
	}
	return fmt.Sprint(uid)
}

// printable keeps what a guest chose from reaching the caller's terminal as
// control characters.
func printable(s string) string {
	b := []rune(s)
	for i, r := range b {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			b[i] = '?'
		}
	}
	return string(b)
}
