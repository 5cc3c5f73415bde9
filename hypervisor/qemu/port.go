package qemu

import (
	"context"
	"encoding/json"
	"net"
	"sync"

	"github.com/hyperhq/runv/hypervisor"
)

// port is the guest's side of the agent's serial port, as far as QEMU tells.
//
//	closed ──guest opens──▶ open ──we hang up──▶ stale ──guest opens again──▶ open
//
// QEMU sends no more than one event a second: what happens in between is told
// by the last state. So after hanging up the next word that the port is open
// counts, whether or not QEMU has said that it was closed.
type port struct {
	mu      sync.Mutex
	state   portState
	dialled bool          // guarded by mu; a connection is open
	changed chan struct{} // guarded by mu; closed at the next change, nil if nobody waits
}

type portState int

const (
	portClosed portState = iota // the guest has not opened it
	portOpen                    // the guest has it open and waits, or is served
	portStale                   // the guest has it open and may not know that we hung up
)

func (s portState) String() string {
	return map[portState]string{portClosed: "closed", portOpen: "open", portStale: "stale"}[s]
}

// change runs f and wakes those who wait.
func (p *port) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// set is an event of QEMU.
func (p *port) set(open bool) {
	p.change(func() {
		if open {
			p.state = portOpen
		} else {
			p.state = portClosed
		}
	})
}

func (p *port) dial() { p.change(func() { p.dialled = true }) }

func (p *port) hangUp() {
	p.change(func() {
		p.dialled = false
		if p.state == portOpen {
			p.state = portStale
		}
	})
}

// await returns when the port is open and nobody is connected.
func (p *port) await(ctx context.Context, ended <-chan struct{}) error {
	for {
		p.mu.Lock()
		if p.dialled {
			p.mu.Unlock()
			return ErrConnected
		}
		if p.state == portOpen {
			p.mu.Unlock()
			return nil
		}
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ended:
			return hypervisor.ErrEnded
		}
	}
}

// portEvent reads the data of VSERPORT_CHANGE.
func portEvent(data json.RawMessage) (id string, open, ok bool) {
	var e struct {
		ID   string `json:"id"`
		Open *bool  `json:"open"`
	}
	if err := json.Unmarshal(data, &e); err != nil || e.Open == nil {
		return "", false, false
	}
	return e.ID, *e.Open, true
}

// agentConn tells its port when it is closed.
type agentConn struct {
	*net.UnixConn
	hangUp func()
	once   sync.Once
}

func (c *agentConn) Close() error {
	err := c.UnixConn.Close()
	c.once.Do(c.hangUp)
	return err
}
