package containerdshim

import (
	"context"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
)

// serviceV2 is the Task API of containerd before 2.0. Its messages have the
// fields and numbers of those of version 3 (a test compares them), so the same
// methods answer under its name.
const serviceV2 = "containerd.task.v2.Task"

// RegisterTTRPC makes the service known to the shim's server.
func (s *service) RegisterTTRPC(srv *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(srv, s)
	srv.RegisterService(serviceV2, &ttrpc.ServiceDesc{Methods: s.methods()})
	return nil
}

func (s *service) methods() map[string]ttrpc.Method {
	return map[string]ttrpc.Method{
		"State":      method(s.State),
		"Create":     method(s.Create),
		"Start":      method(s.Start),
		"Delete":     method(s.Delete),
		"Pids":       method(s.Pids),
		"Pause":      method(s.Pause),
		"Resume":     method(s.Resume),
		"Checkpoint": method(s.Checkpoint),
		"Kill":       method(s.Kill),
		"Exec":       method(s.Exec),
		"ResizePty":  method(s.ResizePty),
		"CloseIO":    method(s.CloseIO),
		"Update":     method(s.Update),
		"Wait":       method(s.Wait),
		"Stats":      method(s.Stats),
		"Connect":    method(s.Connect),
		"Shutdown":   method(s.Shutdown),
	}
}

// method makes a handler of a method with its request.
func method[Req, Resp any](f func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := new(Req)
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		return f(ctx, req)
	}
}
