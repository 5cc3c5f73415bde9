package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/state"
)

func (a *app) inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "show what runv knows of a container, its pod and its virtual machine",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

Prints one JSON object: the container as it is recorded, its pod, the virtual machine
with what it uses, the directories and files of the host that it is shown, and how long
each step of its start took. Of a pod that has ended, what is recorded is left.`,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			id := cmd.Args().First()
			ct, err := a.client.Get(id)
			if err != nil {
				return err
			}
			r, err := a.client.Inspect(ctx, id)
			if err != nil {
				return err
			}
			enc := json.NewEncoder(cmd.Root().Writer)
			enc.SetIndent("", "  ")
			return enc.Encode(inspection(ct, r))
		},
	}
}

// The object that inspect prints.
type (
	inspected struct {
		containerState
		Sandbox    string                `json:"sandbox"`
		StandIn    *state.ProcessRef     `json:"standIn,omitempty"`
		Supervisor *state.ProcessRef     `json:"supervisor,omitempty"`
		Terminal   bool                  `json:"terminal"`
		ExitCode   *int                  `json:"exitCode,omitempty"`
		ExitSignal int                   `json:"exitSignal,omitempty"`
		Resources  *specs.LinuxResources `json:"resources,omitempty"`
		Cgroups    []string              `json:"cgroups,omitempty"`
		Mounts     []inspectedMount      `json:"mounts,omitempty"`
		Execs      []string              `json:"execs,omitempty"`
		Pod        *inspectedPod         `json:"pod,omitempty"`
		VM         *inspectedVM          `json:"vm,omitempty"`
		Start      *inspectedStart       `json:"start,omitempty"`
	}
	inspectedMount struct {
		Source   string `json:"source"`
		Share    string `json:"share"`
		ReadOnly bool   `json:"readOnly"`
		Field    string `json:"field,omitempty"`
	}
	inspectedPod struct {
		Containers []string `json:"containers"`
		Version    string   `json:"version"`
	}
	inspectedVM struct {
		Driver         string   `json:"driver"`
		Machine        string   `json:"machine,omitempty"`
		Kernel         string   `json:"kernel"`
		Initrd         string   `json:"initrd"`
		KernelRelease  string   `json:"kernelRelease,omitempty"`
		Agent          string   `json:"agent,omitempty"`
		Architecture   string   `json:"architecture,omitempty"`
		Template       string   `json:"template,omitempty"`
		TemplatePolicy string   `json:"templatePolicy,omitempty"`
		Cloned         bool     `json:"cloned"`
		Warning        string   `json:"warning,omitempty"`
		Network        string   `json:"network,omitempty"`
		Share          string   `json:"share,omitempty"`
		Usage          *jsonVM  `json:"usage,omitempty"`
		Args           []string `json:"args,omitempty"`
	}
	inspectedStart struct {
		Begun time.Time `json:"begun"`
		// Microseconds after Begun.
		Cgroup     uint64 `json:"cgroupUsec,omitempty"`
		Shares     uint64 `json:"sharesUsec,omitempty"`
		VM         uint64 `json:"vmUsec,omitempty"`
		Agent      uint64 `json:"agentUsec,omitempty"`
		Configured uint64 `json:"configuredUsec,omitempty"`
		Created    uint64 `json:"createdUsec,omitempty"`
	}
)

func inspection(ct *client.Container, r *supervisorv1.InspectResponse) *inspected {
	out := &inspected{
		containerState: stateOf(ct), Sandbox: ct.SandboxID, Terminal: ct.Terminal, Resources: ct.Resources, Cgroups: ct.Cgroups,
	}
	if ct.Status == state.Stopped && ct.Record.Status == state.Stopped {
		out.ExitCode, out.ExitSignal = &ct.ExitCode, ct.ExitSignal
	}
	if ct.StandIn.Alive() {
		out.StandIn = &ct.StandIn
	}
	if ct.Supervisor.Alive() {
		out.Supervisor = &ct.Supervisor
	}
	if r == nil {
		return out
	}
	out.Pod = &inspectedPod{Containers: r.Info.GetContainerIds(), Version: r.Info.GetVersion()}
	for _, c := range r.Containers {
		if c.Id != ct.ID {
			continue
		}
		out.Execs = c.ExecIds
		for _, m := range c.Mounts {
			out.Mounts = append(out.Mounts, inspectedMount{Source: m.Source, Share: m.SharePath, ReadOnly: m.ReadOnly, Field: m.Field})
		}
	}
	if r.Info.GetVmPid() != 0 {
		args := make([]string, 0, len(r.VmArgs))
		for _, arg := range r.VmArgs {
			args = append(args, printable(arg))
		}
		out.VM = &inspectedVM{
			Driver: r.Info.Driver, Machine: r.Machine, Kernel: r.Vm.GetKernel(), Initrd: r.Vm.GetInitrd(),
			KernelRelease: printable(r.KernelRelease), Agent: printable(r.AgentVersion), Architecture: printable(r.Architecture),
			Template: r.Vm.GetTemplate(), TemplatePolicy: r.Vm.GetTemplatePolicy(), Cloned: r.Cloned, Warning: r.VmWarning,
			Network: r.Vm.GetNetwork(), Share: r.Share, Usage: vmJSON(r.Stats), Args: args,
		}
	}
	if t := r.Start; t != nil {
		out.Start = &inspectedStart{
			Begun: time.Unix(0, t.BegunUnixNano).UTC(), Cgroup: t.CgroupUsec, Shares: t.SharesUsec, VM: t.VmUsec,
			Agent: t.AgentUsec, Configured: t.ConfiguredUsec, Created: t.CreatedUsec,
		}
	}
	return out
}

// podOf names a container's pod for messages.
func podOf(ct *client.Container) string {
	if ct.SandboxID == ct.ID {
		return fmt.Sprintf("container %q", ct.ID)
	}
	return fmt.Sprintf("container %q, in the pod of %q,", ct.ID, ct.SandboxID)
}
