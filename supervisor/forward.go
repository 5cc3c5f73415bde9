package supervisor

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/golang/glog"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/network"
	"github.com/hyperhq/runv/ocispec"
)

// answerLimit is how long a connection waits for the guest: longer than the agent
// lets a program of the pod take.
const answerLimit = 10 * time.Second

// forwarder leads connections to the loopback of the pod's network namespace on
// to the pod's own, which is in the guest. CRI implementations forward ports so:
// they join the namespace and connect to localhost.
type forwarder struct {
	id   string
	open func(ctx context.Context, to netip.AddrPort) (forwarded, error)

	stop context.CancelFunc
	wg   sync.WaitGroup
}

// forwarded is a connection in the guest: a guest.Forward.
type forwarded interface {
	Answer() error
	Splice(conn *net.TCPConn) error
	Discard() error
}

// attempt is one on the host: a network.Attempt.
type attempt interface {
	To() netip.AddrPort
	Accept(ctx context.Context) (*net.TCPConn, error)
	Refuse()
	Drop()
}

// forwards tells whether a CRI implementation made the pod of these annotations.
func forwards(annotations map[string]string) bool {
	pod, err := ocispec.PodOf(annotations)
	return err == nil && pod.Sandbox
}

// forward begins to lead connections to the pod, side by side with what the pod
// does; it is called once. A pod without works otherwise, so what fails is a warning.
func (n *podNetwork) forward() {
	f := &forwarder{id: n.id, open: func(ctx context.Context, to netip.AddrPort) (forwarded, error) {
		// Not the pointer as it is: of a nil one the interface would be none.
		c, err := n.client.Forward(ctx, to)
		if err != nil {
			return nil, err
		}
		return c, nil
	}}
	ctx, cancel := context.WithCancel(context.Background())
	f.stop = cancel
	f.wg.Go(func() {
		defer cancel()
		f.watch(ctx, n.file)
	})
	n.forwarder.Store(f)
}

// watch leads connections on until ctx ends.
func (f *forwarder) watch(ctx context.Context, ns *os.File) {
	l, err := network.OpenLoopback(ns)
	if err != nil {
		glog.Warningf("pod %s: ports are not forwarded: %v", f.id, err)
		return
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = l.Close()
	})
	defer func() {
		if stop() {
			_ = l.Close()
		} else {
			<-closed
		}
	}()
	err = f.serve(ctx, func() (attempt, error) {
		a, err := l.Next()
		if err != nil {
			return nil, err
		}
		return a, nil
	})
	if ctx.Err() == nil {
		glog.Warningf("pod %s: ports are not forwarded any more: %v", f.id, err)
	}
}

// serve leads on what next returns until that fails. What is too much is dropped,
// so that it comes again.
func (f *forwarder) serve(ctx context.Context, next func() (attempt, error)) error {
	places := make(chan struct{}, agentv1.MaxForwards)
	for {
		a, err := next()
		if err != nil {
			return err
		}
		select {
		case places <- struct{}{}:
		default:
			a.Drop()
			continue
		}
		f.wg.Go(func() {
			defer func() { <-places }()
			f.lead(ctx, a)
		})
	}
}

// lead connects an attempt with the guest, and returns when nothing of it is left,
// in the guest neither.
func (f *forwarder) lead(ctx context.Context, a attempt) {
	open, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	c, err := f.open(open, a.To())
	if err != nil {
		a.Refuse()
		return
	}
	late := context.AfterFunc(open, a.Drop)
	err = c.Answer()
	if !late() { // it was dropped
		if err == nil {
			err = c.Discard()
		}
		glog.V(1).Infof("pod %s: %v was not answered in time: %v", f.id, a.To(), err)
		return
	}
	if err != nil {
		a.Refuse()
		if !errors.Is(err, guest.ErrRefused) {
			glog.V(1).Infof("pod %s: %v", f.id, err)
		}
		return
	}
	conn, err := a.Accept(ctx)
	if err != nil {
		glog.V(1).Infof("pod %s: %v", f.id, errors.Join(err, c.Discard()))
		return
	}
	if err := c.Splice(conn); err != nil && !errors.Is(err, guest.ErrDead) {
		glog.V(1).Infof("pod %s: forward to %v: %v", f.id, a.To(), err)
	}
}

// leave begins to end the forwarder. The kernel takes up to 15 ms (measured) to
// remove the table, in which the VM can end.
func (n *podNetwork) leave() {
	if n == nil {
		return
	}
	if f := n.forwarder.Load(); f != nil {
		f.stop()
	}
}

// close ends it, if there is one, and waits until nothing of it is left. The
// connection to the guest has ended.
func (f *forwarder) close() {
	if f == nil {
		return
	}
	f.stop()
	f.wg.Wait()
}
