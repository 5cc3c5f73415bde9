package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

// claimTime bounds what a creator waits for an answer. A factory that does not
// answer has been stopped or is on a machine that has no time for it; starting a
// supervisor is the better choice then.
const claimTime = 500 * time.Millisecond

// ErrRefused is wrapped if the factory has no standby for a claim.
var ErrRefused = errors.New("the factory has no supervisor for this")

// Handover is what a claimed supervisor is given by its creator, which keeps its
// own descriptors.
type Handover struct {
	// API and IO are listening sockets, Lifeline the read end of the pipe that
	// ends with the creator, Log the pod's log, open for appending.
	API, IO, Lifeline, Log *os.File
	// MountNS is the mount namespace in which sources of mounts are looked up.
	MountNS *os.File
	// Dir is the pod's directory.
	Dir *os.File
}

func (h *Handover) files() []*os.File {
	return []*os.File{h.API, h.IO, h.Lifeline, h.Log, h.MountNS, h.Dir}
}

// Claimed is a supervisor that was a standby.
type Claimed struct {
	// Process is the supervisor. It is not a child of the caller.
	Process state.ProcessRef
	conn    *net.UnixConn
}

// Claim asks the factory in dir for a supervisor. Claim.Namespaces are filled in.
// With an error, nobody has what was handed over, or can do anything with it: the
// caller makes new sockets and starts a supervisor itself.
func Claim(ctx context.Context, dir string, c *supervisorv1.Claim, h Handover) (_ *Claimed, err error) {
	c.Namespaces = namespaces()
	conn, err := dial(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	begin := time.Now()
	_ = conn.SetDeadline(begin.Add(claimTime))
	stop := bound(ctx, conn)
	defer stop()
	var fds []int
	for _, f := range h.files() {
		fds = append(fds, int(f.Fd()))
	}
	if err := send(conn, &supervisorv1.FactoryRequest{Ask: &supervisorv1.FactoryRequest_Claim{Claim: c}}, fds...); err != nil {
		return nil, fmt.Errorf("claim a supervisor: %w", why(ctx, err))
	}
	var a supervisorv1.ClaimAnswer
	got, err := receive(conn, &a)
	if err != nil {
		return nil, fmt.Errorf("claim a supervisor: %w", why(ctx, err))
	}
	got.close()
	if a.Refused != "" {
		return nil, fmt.Errorf("%w: %s", ErrRefused, a.Refused)
	}
	s := a.GetSupervisor()
	ref := state.ProcessRef{Pid: int(s.GetPid()), StartTime: s.GetStartTime()}
	if !ref.Alive() {
		return nil, fmt.Errorf("claim a supervisor: process %d: %w", ref.Pid, state.ErrGone)
	}
	if _, err := conn.Write(taken); err != nil {
		return nil, fmt.Errorf("claim a supervisor: %w", why(ctx, err))
	}
	_ = conn.SetDeadline(time.Time{})
	return &Claimed{Process: ref, conn: conn}, nil
}

// Orderly tells, after the supervisor has ended, whether it ended by itself and
// so has taken back what it began.
func (c *Claimed) Orderly() bool {
	// What it wrote is there by now, or the end of the connection is.
	_ = c.conn.SetReadDeadline(time.Now().Add(claimTime))
	b := make([]byte, len(taken))
	n, err := c.conn.Read(b)
	return err == nil && n == len(taken)
}

// Close lets go of the supervisor, which goes on.
func (c *Claimed) Close() { _ = c.conn.Close() }
